#!/bin/bash
# Table 1: the 8-layer CNN by FA, DFA, Align-ada at three rates, and by DeepZero; squared error.
# From the root of the clone: sbatch slurm/studies/table1.sh, then bash slurm/studies/table1.sh report; on two cores: SIZE=small bash slurm/studies/table1.sh
#SBATCH --job-name=table1
#SBATCH --array=0-59%8
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: a member requeues itself until its run is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued member must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it

members() {
    local widths="64 512" methods="fa dfa align-ada" more="" seed width method rate deepzero
    case $SIZE in
        small) widths=16 methods="$methods autograd" more="data.train_limit=10000 stop.epochs=20" ;;
        look) widths=16 methods="$methods autograd" more="data.train_limit=2000 stop.epochs=5" ;;
    esac
    for seed in $SEEDS; do
        for width in $widths; do
            for method in $methods; do
                for rate in 5.0 2.0 1.0; do
                    echo "inputs/table1.toml $method-width$width/lr$rate-seed$seed zo.estimator=$method model.width=$width optim.lr=$rate run.seed=$seed $more"
                done
            done
        done
        deepzero="inputs/resnet20.toml deepzero-width%s/seed$seed model.name=cnn8 model.width=%s task.loss=mse run.seed=$seed\n"
        if [ "$SIZE" = paper ]; then printf "$deepzero" 32 32 64 64; continue; fi
        more="$more data.batch_size=100 data.augment=false optim.warmup_epochs=1.0 sparsity.redraw_epochs=1 sparsity.q=32 eval.every_epochs=5"
        for rate in 0.5 0.2 0.1; do # with a momentum of 0.9 these go as far as the rivals' rates
            echo "inputs/resnet20.toml standin-width16/lr$rate-seed$seed $AUTOGRAD model.name=cnn8 model.width=16 task.loss=mse optim.lr=$rate run.seed=$seed $more"
        done
    done
}

source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/studies/study.sh" || { echo "submit from the root of the clone" >&2; exit 4; }
OVER=optim.lr
study table1 "$@"
