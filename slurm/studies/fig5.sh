#!/bin/bash
# Fig. 5: pattern search against DeepZero on N images, at equal queries: the moves of a step are as many as the coordinates of S.
# From the root of the clone: sbatch slurm/studies/fig5.sh, then bash slurm/studies/fig5.sh report; on two cores: SIZE=small bash slurm/studies/fig5.sh
#SBATCH --job-name=fig5
#SBATCH --array=0-15%8
#SBATCH --ntasks=8
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: a member requeues itself until its run is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued member must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it

members() {
    local sizes="100 500 1000 2000 4000 8000 16000 32000" seeds=0 moves=28220 more="stop.epochs=40" size batch both
    if [ "$SIZE" = small ]; then sizes="100 500 1000 2000" moves=4068 more="stop.epochs=10 sparsity.ratio=0.99"; fi
    if [ "$SIZE" = look ]; then # the CNN of Fig. 2, all 730 weights of it
        sizes="100 500 1000 2000" seeds="0 1 2" moves=730 more="stop.epochs=40 model.name=cnn model.depth=1 sparsity.ratio=0.0 eval.every_epochs=40"
    fi
    for seed in $seeds; do
        for size in $sizes; do
            batch=$((size < 2048 ? size / 4 : 512)) # four steps an epoch at least
            both="data.train_limit=$size data.batch_size=$batch data.augment=false run.seed=$seed"
            echo "inputs/resnet20.toml deepzero/$size-seed$seed $both $more"
            echo "inputs/pattern-search.toml pattern/$size-seed$seed $both $more zo.q=$moves sparsity.ratio=0.0"
        done
    done
}

source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/studies/study.sh" || { echo "submit from the root of the clone" >&2; exit 4; }
OVER=data.train_limit
study fig5 "$@"
