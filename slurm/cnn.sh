#!/bin/bash
# Fig. 2 of the paper: simple CNNs of depth 1 to 5 by dense CGE, three seeds each: 15 runs in runs/cnn/. From the root of the clone:
#   sbatch slurm/cnn.sh                                 # all;  sbatch --array=0,5,10 slurm/cnn.sh: depth 1 alone
#   python -m dzhpc.report --campaign runs/cnn          # the state of all of them
# Arguments behind the script's name reach `python -m dzhpc.train`: --set stop.epochs=1. Needs: python -m dzhpc.fetch cifar10 --root data

#SBATCH --job-name=cnn
#SBATCH --array=0-14                # member = depth - 1 + 5 * seed
#SBATCH --ntasks=8                  # on the CPU: one rank a core, these networks are small
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=12:00:00             # of one stretch: a member requeues itself until its run is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued member must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it; without, nobody would hear it under mpirun
INPUT=${INPUT:-inputs/cnn.toml}
member=${SLURM_ARRAY_TASK_ID:-0}
depth=$((member % 5 + 1))
seed=$((member / 5))

# slurmd runs a copy of this script in a folder of its own, so files beside it are found through the folder of the sbatch.
source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/launch.sh" || { echo "submit from the root of the clone" >&2; exit 4; }

# The user's arguments come last, so they win. One run folder a member: with --run-dir D all of them would meet in D.
set -- --set run.dir=runs/cnn --set "run.name=depth-$depth-seed-$seed" --set "model.depth=$depth" --set "run.seed=$seed" "$@"
need_input "$@"
launch train "$INPUT" "$@"
