#!/bin/bash
# Fig. 6: solver in the loop: three valid simulations choose the checkpoint, four seeds. SRC, no correction, is always in the table.
# From the root of the clone: bash slurm/studies/fig6.sh submit, then bash slurm/studies/fig6.sh report; on two cores: SIZE=small bash slurm/studies/fig6.sh
#SBATCH --job-name=fig6
#SBATCH --ntasks=8
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: a member requeues itself until its run is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued member must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it

members() {
    local input=inputs/sol.toml seeds="0 1 2 3" more="" methods="ZO-SOL GN-SOL FO-SOL NON" valid method seed name keys runs=""
    local adam="optim.name=adam optim.lr=1e-4 optim.warmup_epochs=0 optim.schedule=constant stop.epochs=10 checkpoint.every_steps=484"
    valid="task.valid_parameters=[226274.17,905096.68,3620386.7]" # 160e3, 640e3, 2560e3, each times the root of 2
    if [ "$SIZE" != paper ]; then # Adam by queries takes 15 times the time of Gauss-Newton's (GN-SOL)
        input=inputs/sol-small.toml methods="GN-SOL FO-SOL NON ZO-SOL"
        adam="optim.name=adam optim.lr=5e-4 optim.warmup_epochs=0 stop.epochs=0.5 checkpoint.every_steps=41"
    fi
    if [ "$SIZE" = look ]; then methods="GN-SOL FO-SOL NON"; fi
    echo "simulate wake inputs/sol.toml -o $DIR/wake.h5 --set $valid"
    echo
    for seed in $seeds; do
        for method in $methods; do
            name=$method runs="$runs $DIR/$method"
            if [ "$seed" != 0 ]; then name=$method-$seed runs="$runs-$seed"; fi
            case $method in
                GN-SOL) keys="" ;;
                ZO-SOL) keys="$adam" ;;
                FO-SOL) keys="$adam zo.estimator=autograd" ;;
                NON) keys="$adam zo.estimator=autograd task.unroll=1" ;;
            esac
            echo "$input $name data.root=$DIR run.seed=$seed $valid $keys"
        done
    done
    echo
    echo "evaluate evaluation $runs -o $DIR/evaluation --data-root $DIR"
}

source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/studies/study.sh" || { echo "submit from the root of the clone" >&2; exit 4; }
report() { python -m dzhpc.report --campaign "$DIR" -o "$DIR/report"; }
study fig6 "$@"
