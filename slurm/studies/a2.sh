#!/bin/bash
# Tables A2 and A3: ResNet-20 and ResNet-18 with pruned weights, trained first-order: random, FO-GraSP, ZO-GraSP.
# From the root of the clone: sbatch slurm/studies/a2.sh, then bash slurm/studies/a2.sh report; on two cores: SIZE=small bash slurm/studies/a2.sh
#SBATCH --job-name=a2
#SBATCH --array=0-179%8
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: a member requeues itself until its run is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued member must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it

members() {
    local ratios="0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 0.95" models="resnet20 resnet18" model seed ratio scores words
    if [ "$SIZE" != paper ]; then ratios="0.5 0.9 0.95" models=resnet20; fi
    for model in $models; do
        for seed in $SEEDS; do
            for ratio in $ratios; do
                for scores in random fo-grasp zo-grasp; do
                    if [ $scores = fo-grasp ]; then words=$GRASP; else words="sparsity.scores=$scores"; fi
                    echo "inputs/resnet20.toml $model-$scores/$ratio-seed$seed $AUTOGRAD model.name=$model sparsity.target=weights sparsity.pattern=static $words sparsity.ratio=$ratio run.seed=$seed $MORE"
                done
            done
        done
    done
}

source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/studies/study.sh" || { echo "submit from the root of the clone" >&2; exit 4; }
OVER=sparsity.ratio
study a2 "$@"
