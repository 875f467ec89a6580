#!/bin/bash
# Fig. 4 of the paper: ResNet-20 at 80, 90, 95 and 99 % sparsity, three seeds each: 12 runs in runs/sparsity/. From the clone's root:
#   sbatch slurm/sparsity.sh                            # all;  sbatch --array=3,7,11 slurm/sparsity.sh: 99 % alone
#   python -m dzhpc.report --campaign runs/sparsity     # the state of all of them
# Arguments behind the script's name reach `python -m dzhpc.train`: --set stop.epochs=1. Needs: python -m dzhpc.fetch cifar10 --root data

#SBATCH --job-name=sparsity
#SBATCH --array=0-11%4              # member = number of the ratio + 4 * seed; at most 4 at a time, so that others get a turn
#SBATCH --ntasks=4                  # ranks; any number gives the same bits, also after a requeue with another one
#SBATCH --gpus-per-task=1           # delete on a cluster without GPUs, and raise --ntasks: one rank a core
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: a member requeues itself until its run is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued member must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it; without, nobody would hear it under mpirun
INPUT=${INPUT:-inputs/resnet20.toml}
ratios=(0.80 0.90 0.95 0.99)
member=${SLURM_ARRAY_TASK_ID:-0}
ratio=${ratios[member % 4]}
seed=$((member / 4))

# slurmd runs a copy of this script in a folder of its own, so files beside it are found through the folder of the sbatch.
source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/launch.sh" || { echo "submit from the root of the clone" >&2; exit 4; }

# The user's arguments come last, so they win. One run folder a member: with --run-dir D all of them would meet in D.
set -- --set run.dir=runs/sparsity --set "run.name=ratio-$ratio-seed-$seed" --set "sparsity.ratio=$ratio" --set "run.seed=$seed" "$@"
need_input "$@"
launch train "$INPUT" "$@"
