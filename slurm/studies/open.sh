#!/bin/bash
# Open questions: how sparse, a vision transformer, ResNet-56. First-order runs with sparse gradients are stand-ins for those by CGE.
# From the root of the clone: sbatch slurm/studies/open.sh, then bash slurm/studies/open.sh report; on two cores: SIZE=small bash slurm/studies/open.sh
#SBATCH --job-name=open
#SBATCH --array=0-8%8
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: a member requeues itself until its run is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued member must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it

members() {
    local more="" ratio model
    if [ "$SIZE" = small ]; then more="stop.epochs=10"; fi
    for ratio in 0.8 0.9 0.95 0.98 0.99 0.995 0.999; do
        echo "inputs/resnet20.toml standin-resnet20-$ratio zo.estimator=autograd zo.engine=full sparsity.ratio=$ratio $more"
    done
    for model in resnet56 vit-tiny; do
        echo "inputs/resnet20.toml standin-$model-0.9 zo.estimator=autograd zo.engine=full model.name=$model $more"
    done
}

source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/studies/study.sh" || { echo "submit from the root of the clone" >&2; exit 4; }
study open "$@"
