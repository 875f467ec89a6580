# Sourced by the studies beside it. A study is a list of members, which its function `members` prints, a line each:
#   INPUT METHOD/NAME KEY=VALUE ...        a training in $DIR/METHOD/NAME
#   VERB NAME ARGUMENT ...                 python -m dzhpc.VERB ARGUMENT ...
# Members after an empty line need those before it. Under Slurm a task of the array is one of them, and requeues itself. Elsewhere they
# run one after another, each on two ranks (SLURM_NTASKS=N; LAUNCHER=env: one process), then the report is made. The same command goes
# on where it was stopped.
#   bash slurm/studies/fig5.sh list          the members
#   bash slurm/studies/fig5.sh report        table and figure of what there is, in $DIR/report
#   bash slurm/studies/fig5.sh submit        as many array tasks as there are members; each stage waits for the one before
#   SIZE=small ...                           hours on two cores; SIZE=look: minutes on two cores, far from the paper's numbers
#   ONLY=pattern bash slurm/studies/fig5.sh  those whose name holds a regular expression
# DIR is runs/studies/STUDY/SIZE (RUNS=...: another place for runs/studies). Further arguments reach `python -m dzhpc.train`.

source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/launch.sh" || { echo "submit from the root of the clone" >&2; exit 4; }
export SIZE=${SIZE:-paper} RUNS=${RUNS:-runs/studies} ONLY=${ONLY:-.}
AUTOGRAD="zo.estimator=autograd"
GRASP="sparsity.scores=fo-grasp sparsity.rule=magnitude sparsity.temperature=200" # as the authors' code scores
# What most studies of ResNet-20 do, by size: seeds, and what differs from the paper.
case $SIZE in
    paper) SEEDS="0 1 2" MORE="" ;;
    small) SEEDS=0 MORE="stop.epochs=10" ;;
    look)
        SEEDS=0
        MORE="data.train_limit=2500 data.batch_size=64 data.augment=false stop.epochs=5 optim.warmup_epochs=1.0 eval.every_epochs=5"
        MORE="$MORE sparsity.redraw_epochs=1 sparsity.q=32"
        ;;
    *) echo "SIZE = $SIZE: expected paper, small or look" >&2; exit 2 ;;
esac

# study NAME ARGUMENTS...: do what the first argument says, or run.
study() {
    local lines=() stages=(0) line name
    NAME=$1 DIR=$RUNS/$1/$SIZE
    shift
    while IFS= read -r line; do
        name=${line#* }
        if [ -z "$line" ]; then stages+=("${#lines[@]}"); elif [[ ${name%% *} =~ $ONLY ]]; then lines+=("$line"); fi
    done < <(members)
    stages+=("${#lines[@]}")
    if [ "${#lines[@]}" = 0 ]; then echo "ONLY = $ONLY: no member has such a name" >&2; exit 2; fi
    case ${1:-} in
        list) printf '%s\n' "${lines[@]}" ;;
        report) report ;;
        submit) shift; submit "$@" ;;
        *)
            if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
                line=${lines[SLURM_ARRAY_TASK_ID]:-}
                if [ -z "$line" ]; then echo "member $SLURM_ARRAY_TASK_ID: there are ${#lines[@]}" >&2; exit 4; fi
                member "$line" "$@"
            fi
            for line in "${lines[@]}"; do (member "$line" "$@") || exit; done
            report
            ;;
    esac
}

# member LINE ARGUMENTS...: one run, in a folder of its own, or one call of another verb.
member() {
    local words word keys=()
    read -ra words <<< "$1"
    shift
    mkdir -p "$DIR"
    if [[ ${words[0]} != *.toml ]]; then
        if [ "${words[0]}" = bench ]; then LAUNCHER=env; fi # it starts its ranks itself
        launch "${words[0]}" "${words[@]:2}"
    fi
    for word in "${words[@]:2}"; do keys+=(--set "$word"); done
    INPUT=${words[0]}
    set -- --set "run.dir=$DIR" --set "run.name=${words[1]}" "${keys[@]}" "$@"
    need_input "$@"
    launch train "$INPUT" "$@"
}

# submit ARGUMENTS...: an array for each stage, which waits until all of the one before have succeeded.
submit() {
    local k before="" jobs=""
    for ((k = 0; k + 1 < ${#stages[@]}; k++)); do
        if [ "${stages[k]}" = "${stages[k + 1]}" ]; then continue; fi
        before=$(${SBATCH:-sbatch} --parsable ${before:+"--dependency=afterok:$before"} \
            --array="${stages[k]}-$((stages[k + 1] - 1))%8" "slurm/studies/$NAME.sh" "$@") || exit
        jobs="$jobs, $before"
    done
    echo "jobs ${jobs#, }"
}

# some FILES...: whether there is one, which a report needs.
some() {
    if [ ! -s "$1" ]; then echo "$NAME: nothing to report yet"; return 1; fi
}

# The study's key on the horizontal axis is OVER; its numbers in the paper, where there are some, lie beside it.
report() { python -m dzhpc.report --campaign "$DIR" --over "$OVER" --beside slurm/studies/published.tsv --study "$NAME"; }
