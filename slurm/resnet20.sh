#!/bin/bash
# DeepZero's main experiment: ResNet-20 on CIFAR-10 (inputs/resnet20.toml). From the root of the clone:
#   sbatch slurm/resnet20.sh
#   sbatch --ntasks=2 slurm/resnet20.sh --run-dir runs/trial --set stop.epochs=1
# Arguments behind the script's name reach `python -m dzhpc.train`. Needs: python -m dzhpc.fetch cifar10 --root data

#SBATCH --job-name=resnet20
#SBATCH --ntasks=4                  # ranks; any number gives the same bits, also after a requeue with another one
#SBATCH --gpus-per-task=1           # delete on a cluster without GPUs, and raise --ntasks: one rank a core
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: the job requeues itself until the run is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued job must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it; without, nobody would hear it under mpirun
INPUT=${INPUT:-inputs/resnet20.toml}

# slurmd runs a copy of this script in a folder of its own, so files beside it are found through the folder of the sbatch.
source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/launch.sh" || { echo "submit from the root of the clone" >&2; exit 4; }

need_input "$@"
launch train "$INPUT" "$@"
