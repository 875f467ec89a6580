#!/bin/bash
# Fig. 4: ResNet-20 by DeepZero, first-order with sparse gradients, with sparse weights, and dense.
# From the root of the clone: sbatch slurm/studies/fig4.sh, then bash slurm/studies/fig4.sh report; on two cores: SIZE=small bash slurm/studies/fig4.sh
#SBATCH --job-name=fig4
#SBATCH --array=0-38%8
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: a member requeues itself until its run is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued member must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it

members() {
    local ratios="0.8 0.9 0.95 0.99" seed ratio
    if [ "$SIZE" != paper ]; then ratios="0.9 0.99"; fi
    if [ "$SIZE" = small ]; then MORE="stop.epochs=20"; fi
    for seed in $SEEDS; do
        echo "inputs/resnet20.toml dense/0.0-seed$seed $AUTOGRAD sparsity.ratio=0.0 run.seed=$seed $MORE"
        for ratio in $ratios; do
            echo "inputs/resnet20.toml standin/$ratio-seed$seed $AUTOGRAD sparsity.ratio=$ratio run.seed=$seed $MORE"
            echo "inputs/resnet20.toml weights/$ratio-seed$seed $AUTOGRAD sparsity.ratio=$ratio sparsity.target=weights sparsity.pattern=static $GRASP run.seed=$seed $MORE"
            if [ "$SIZE" = paper ]; then echo "inputs/resnet20.toml deepzero/$ratio-seed$seed sparsity.ratio=$ratio run.seed=$seed"; fi
        done
    done
}

source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/studies/study.sh" || { echo "submit from the root of the clone" >&2; exit 4; }
OVER=sparsity.ratio
study fig4 "$@"
