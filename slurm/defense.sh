#!/bin/bash
# The defence campaign (inputs/defense-cifar10.toml): pre-training, fine-tuning by queries, certification. From the root of the clone:
#   bash slurm/defense.sh                               # submits the three jobs, each waits until the one before has succeeded
#   INPUT=inputs/defense-small.toml SBATCH="sbatch --ntasks=2" bash slurm/defense.sh --set run.seed=1
#   sbatch slurm/defense.sh finetune --set model.weights=dncnn_color_blind.pth      # one stage: pretrain, finetune or certify
# Arguments behind the script's name, or the stage's, reach `python -m dzhpc.train`, both times; those of PRETRAIN the first time, those
# of CERTIFY reach `python -m dzhpc.certify`. Needs: python -m dzhpc.fetch cifar10 --root data, and the input's classifier.

#SBATCH --job-name=defense
#SBATCH --ntasks=4                  # ranks; any number gives the same bits, also after a requeue with another one
#SBATCH --gpus-per-task=1           # delete on a cluster without GPUs, and raise --ntasks: one rank a core
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: a job requeues itself until its stage is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued job must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it; without, nobody would hear it under mpirun
export INPUT=${INPUT:-inputs/defense-cifar10.toml}
export PRETRAIN=${PRETRAIN:---set optim.lr=1e-3 --set stop.epochs=90}
export CERTIFY=${CERTIFY:---images 200 --n 1000}

# slurmd runs a copy of this script in a folder of its own, so files beside it are found through the folder of the sbatch.
source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/launch.sh" || { echo "submit from the root of the clone" >&2; exit 4; }

if [ -z "${SLURM_JOB_ID:-}" ]; then # not a job yet
    chain slurm/defense.sh "pretrain finetune certify" "$@"
    exit
fi

stage=${1:-}
if [ -n "$stage" ]; then shift; fi
run=$(run_folder "$@") || exit
run=${run%/}

# The user's arguments come last, so they win; but the pre-training has a run folder of its own.
case $stage in
    pretrain)
        set -- --set task.loss=mse --set zo.estimator=autograd --set sparsity.ratio=0.0 --set 'model.trainable=["*"]' \
            --set model.weights= --set optim.name=adam $PRETRAIN "$@" --set "run.name=$(basename "$run")-pretrained" --run-dir "$run-pretrained"
        need_input "$@"
        launch train "$INPUT" "$@"
        ;;
    finetune)
        set -- --set "model.weights=$run-pretrained" "$@"
        need_input "$@"
        launch train "$INPUT" "$@"
        ;;
    certify) launch certify "$run" $CERTIFY ;;
    *)
        echo "slurm/defense.sh $stage: expected pretrain, finetune or certify; without sbatch, bash slurm/defense.sh submits all" >&2
        exit 2
        ;;
esac
