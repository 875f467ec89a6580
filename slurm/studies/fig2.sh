#!/bin/bash
# Fig. 2: simple CNNs by CGE, RGE (q = d) and first-order; RGE without momentum, too, which bounds its rate less.
# From the root of the clone: sbatch slurm/studies/fig2.sh, then bash slurm/studies/fig2.sh report; on two cores: SIZE=small bash slurm/studies/fig2.sh
#SBATCH --job-name=fig2
#SBATCH --array=0-59%8
#SBATCH --ntasks=8
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: a member requeues itself until its run is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued member must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it

members() {
    local depths="1 2 3 4 5" more="" seed depth
    if [ "$SIZE" = small ]; then depths="1 2 3"; fi
    if [ "$SIZE" = look ]; then depths="1 2" more="data.train_limit=1280 data.batch_size=32 stop.epochs=2 eval.every_epochs=2"; fi
    for seed in 0 1 2; do
        for depth in $depths; do
            if [ "$SIZE.$depth" = small.3 ] && [ "$seed" != 0 ]; then continue; fi
            echo "inputs/cnn.toml cge/depth$depth-seed$seed model.depth=$depth run.seed=$seed $more"
            echo "inputs/cnn.toml first-order/depth$depth-seed$seed $AUTOGRAD model.depth=$depth run.seed=$seed $more"
            if [ "$SIZE" != paper ] && [ "$depth" != 1 ]; then continue; fi
            echo "inputs/cnn.toml rge/depth$depth-seed$seed zo.estimator=rge zo.engine=full model.depth=$depth run.seed=$seed $more"
            echo "inputs/cnn.toml rge-plain/depth$depth-seed$seed zo.estimator=rge zo.engine=full optim.momentum=0.0 model.depth=$depth run.seed=$seed $more"
        done
    done
}

source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/studies/study.sh" || { echo "submit from the root of the clone" >&2; exit 4; }
OVER=model.depth
study fig2 "$@"
