#!/bin/bash
# Fig. A3: where S comes from: drawn by fixed ratios (ours), scored anew at every step (M1), kept (M2), with sparse gradients or weights.
# From the root of the clone: sbatch slurm/studies/a3.sh, then bash slurm/studies/a3.sh report; on two cores: SIZE=small bash slurm/studies/a3.sh
#SBATCH --job-name=a3
#SBATCH --array=0-35%8
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: a member requeues itself until its run is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued member must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it

members() {
    local ratios="0.8 0.9 0.99" every=1 seed ratio base
    if [ "$SIZE" != paper ]; then ratios="0.9 0.99"; fi
    if [ "$SIZE" = look ]; then every=10; fi # scores cost more than steps
    for seed in $SEEDS; do
        for ratio in $ratios; do
            base="$AUTOGRAD sparsity.ratio=$ratio run.seed=$seed $MORE"
            echo "inputs/resnet20.toml ours/$ratio-seed$seed $base"
            echo "inputs/resnet20.toml m1/$ratio-seed$seed $base sparsity.pattern=regrasp sparsity.redraw_steps=$every"
            echo "inputs/resnet20.toml m2-gradients/$ratio-seed$seed $base sparsity.pattern=static"
            echo "inputs/resnet20.toml m2-weights/$ratio-seed$seed $base sparsity.pattern=static sparsity.target=weights"
        done
    done
}

source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/studies/study.sh" || { echo "submit from the root of the clone" >&2; exit 4; }
OVER=sparsity.ratio
study a3 "$@"
