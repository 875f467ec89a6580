#!/bin/bash
# Fig. A5: the batch size at 90 %. The first-order runs with sparse gradients are stand-ins for those by CGE.
# From the root of the clone: sbatch slurm/studies/a5.sh, then bash slurm/studies/a5.sh report; on two cores: SIZE=small bash slurm/studies/a5.sh
#SBATCH --job-name=a5
#SBATCH --array=0-27%8
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: a member requeues itself until its run is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued member must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it

members() {
    local sizes="128 256 512 1024 2048 4096 8192" seed size
    case $SIZE in
        paper) SEEDS="0 1" ;;
        look) sizes="16 32 64 128 256 512" ;;
    esac
    for seed in $SEEDS; do
        for size in $sizes; do
            echo "inputs/resnet20.toml standin/$size-seed$seed $AUTOGRAD run.seed=$seed $MORE data.batch_size=$size"
            if [ "$SIZE" = paper ]; then echo "inputs/resnet20.toml deepzero/$size-seed$seed data.batch_size=$size run.seed=$seed"; fi
        done
    done
}

source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/studies/study.sh" || { echo "submit from the root of the clone" >&2; exit 4; }
OVER=data.batch_size
study a5 "$@"
