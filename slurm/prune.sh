#!/bin/bash
# Scores once, trains many times: ZO-GraSP writes the layer-wise pruning ratios, which trainings then read. From the root of the clone:
#   job=$(sbatch --parsable slurm/prune.sh -o runs/lpr.h5)
#   sbatch --dependency=afterok:$job slurm/resnet20.sh --set sparsity.lpr=runs/lpr.h5
# afterok: the training starts once the file is there, and never if scoring failed; add --kill-on-invalid-dep=yes to have it leave
# the queue then. Arguments behind the script's name reach `python -m dzhpc.prune`; the same --set model... and sparsity.ratio
# belong to both.

#SBATCH --job-name=prune
#SBATCH --ntasks=4                  # ranks share the directions
#SBATCH --gpus-per-task=1           # delete on a cluster without GPUs, and raise --ntasks: one rank a core
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=01:00:00
#SBATCH --requeue                   # after a node failure; scoring begins anew, there is no checkpoint to continue from
#SBATCH --open-mode=append          # what an earlier attempt printed stays
INPUT=${INPUT:-inputs/resnet20.toml}
mkdir -p runs                       # where -o runs/lpr.h5 goes, unless the arguments say otherwise

# slurmd runs a copy of this script in a folder of its own, so files beside it are found through the folder of the sbatch.
source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/launch.sh" || { echo "submit from the root of the clone" >&2; exit 4; }

need_input "$@"
launch prune "$INPUT" -o runs/lpr.h5 "$@"
