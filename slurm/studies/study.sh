# Sourced by the studies beside it. A study is a list of members, which its function `members` prints, a line each:
#   INPUT NAME KEY=VALUE ...
# Under Slurm a task of the array is one of them, and requeues itself. Elsewhere they run one after another, each on two ranks
# (SLURM_NTASKS=N; LAUNCHER=env: one process), then the report is made; the same command goes on where it was stopped.
#   bash slurm/studies/fig5.sh list          the members              SIZE=small: those of the smaller size, for two cores
#   bash slurm/studies/fig5.sh report        table and figure of what there is, in runs/studies/fig5-report
#   ONLY=pattern bash slurm/studies/fig5.sh  those whose name holds a regular expression
# Further arguments reach `python -m dzhpc.train`: --set stop.epochs=1.

source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/launch.sh" || { echo "submit from the root of the clone" >&2; exit 4; }
SIZE=${SIZE:-paper}
case $SIZE in paper | small) ;; *) echo "SIZE = $SIZE: expected paper or small" >&2; exit 2 ;; esac

# study NAME ARGUMENTS...: do what the first argument says, or run.
study() {
    local name=$1 lines
    shift
    mapfile -t lines < <(members | grep -E "^[^ ]+ [^ ]*(${ONLY:-.})")
    case ${1:-} in
        list) printf '%s\n' "${lines[@]}" ;;
        report) report "$name" ;;
        *)
            if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
                if [ -z "${lines[SLURM_ARRAY_TASK_ID]:-}" ]; then echo "member $SLURM_ARRAY_TASK_ID: there are ${#lines[@]}" >&2; exit 4; fi
                member "$name" "${lines[SLURM_ARRAY_TASK_ID]}" "$@"
            fi
            for line in "${lines[@]}"; do (member "$name" "$line" "$@") || exit; done
            report "$name"
            ;;
    esac
}

# member STUDY LINE ARGUMENTS...: one run, in a folder of its own.
member() {
    local name=$1 words word keys=()
    read -ra words <<< "$2"
    shift 2
    for word in "${words[@]:2}"; do keys+=(--set "$word"); done
    INPUT=${words[0]}
    set -- --set "run.dir=runs/studies/$name" --set "run.name=${words[1]}" "${keys[@]}" "$@"
    need_input "$@"
    launch train "$INPUT" "$@"
}

report() { python -m dzhpc.report runs/studies/"$1"/*/ -o "runs/studies/$1-report"; }
