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
    local widths="64 512" zo="32 64" seeds="0 1 2" more="" seed width method rate
    if [ "$SIZE" = small ]; then widths=16 zo="" seeds=0 more="data.train_limit=10000 stop.epochs=20"; fi
    for seed in $seeds; do
        for width in $widths; do
            for method in fa dfa align-ada; do
                for rate in 5.0 2.0 1.0; do
                    echo "inputs/table1.toml $method-width$width-lr$rate-seed$seed zo.estimator=$method model.width=$width optim.lr=$rate run.seed=$seed $more"
                done
            done
        done
        for width in $zo; do
            echo "inputs/resnet20.toml deepzero-width$width-seed$seed model.name=cnn8 model.width=$width task.loss=mse run.seed=$seed"
        done
        if [ "$SIZE" = small ]; then echo "inputs/table1.toml bp-width16-seed$seed zo.estimator=autograd model.width=16 run.seed=$seed $more"; fi
    done
}

source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/studies/study.sh" || { echo "submit from the root of the clone" >&2; exit 4; }
study table1 "$@"
