# Sourced by the job scripts beside it: finds Python and the launcher, checks the data, starts a verb, forwards warnings, requeues.
# Plain names can be set from outside: INPUT=mine.toml LAUNCHER="srun --mpi=pmix" sbatch slurm/resnet20.sh

cd "${SLURM_SUBMIT_DIR:-$PWD}" || exit 4

if [ -x .venv/bin/python ]; then PATH=$PWD/.venv/bin:$PATH; fi
tasks=${SLURM_NTASKS:-2}
if [ -z "${LAUNCHER:-}" ]; then
    if command -v mpirun > /dev/null; then LAUNCHER="mpirun -n $tasks"; else LAUNCHER="srun --mpi=pmix"; fi
    # Open MPI binds a rank to one core, where all threads of the rank would share it.
    if [ "${LAUNCHER%% *}" = mpirun ] && [ "${SLURM_CPUS_PER_TASK:-1}" -gt 1 ]; then LAUNCHER="$LAUNCHER --bind-to none"; fi
fi

# Since Slurm 22.05 srun gives a task one core, whatever the job has asked for, unless it is told so.
if [ "${LAUNCHER%% *}" = srun ] && [ "${SLURM_CPUS_PER_TASK:-1}" -gt 1 ]; then
    export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
fi

# Triton and Inductor compile into these folders: on a parallel file system thousands of small files from every rank are slow,
# and two nodes of different processors must not share machine code. A node's own disk it is, one folder a user.
node_local=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/dzhpc-$(id -u)
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$node_local/inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$node_local/triton}

# HDF5 locks files by flock, which many parallel file systems refuse on compute nodes. dzhpc has one writer, which renames
# finished files into place, and opens without locks: HDF5_USE_FILE_LOCKING need not be set here.

# One thread a rank, as run.threads says, before any library starts its own pool: N ranks times N threads would fight for N cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# This job by the name that means no other: one member of a job array bears the id of the whole array.
job=${SLURM_JOB_ID:-}
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

# When Slurm will end the job, in seconds since 1970; new versions say so themselves.
if [ -n "$job" ] && [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    end=$(squeue -h -j "$job" -o %e) # nothing, where a node has no squeue: that is no date, though `date -d ""` takes it for midnight
    if [ -n "$end" ] && end=$(date -d "$end" +%s 2> /dev/null); then export SLURM_JOB_END_TIME=$end; fi
fi

warned=""       # USR1 (the time limit is near) or TERM (preempted or cancelled), once the job was warned
pid=""          # of the launcher

# Warnings go on as USR1: mpirun relays that to its ranks, but kills them on TERM whatever they handle. They have to wait until the
# program listens (it says so in its status file), since USR1 kills a process that does not.
forward() {
    while kill -0 "$pid" 2> /dev/null; do
        if [ -s "$DZHPC_STATUS" ]; then kill -USR1 "$pid"; break; fi
        sleep 0.5
    done &
}
trap 'warned=${warned:-USR1}; if [ -n "$pid" ]; then forward; fi' USR1
trap 'warned=TERM;            if [ -n "$pid" ]; then forward; fi' TERM

# settings KEYS ARGUMENTS...: the values that a run of $INPUT with these arguments will see, in the array `values`, "" where unset.
settings() {
    local keys=$1 found
    shift
    found=$(python -m dzhpc.info setting "$INPUT" "$keys" -- "$@") || exit
    mapfile -t values <<< "$found"
}

# need_input ARGUMENTS...: fail at once, not after an hour in the queue of the next stage, where the input or its data are missing.
need_input() {
    local root
    if [ ! -f "$INPUT" ]; then
        echo "$INPUT: no such input file in $PWD; submit from the folder that holds inputs/ and slurm/, or set INPUT" >&2
        exit 2
    fi
    settings data.name,data.root,model.weights,task.classifier,task.kind "$@"
    root=${values[1]:-${DZHPC_DATA:-data}}
    # An objective has no data, and a task of your own may have others.
    if [[ ${values[4]} =~ ^(classification|defense)$ ]] && [ "${values[0]}" = cifar10 ] && [ ! -e "$root/cifar10.h5" ] && [ ! -d "$root/cifar10/cifar-10-batches-py" ]; then
        echo "$root: no CIFAR-10 there (cifar10.h5); get it on a node with network access: python -m dzhpc.fetch cifar10 --root $root" >&2
        exit 2
    fi
    # A restart needs no starting weights: the checkpoint has them, and the file may be gone.
    if [ -n "${values[2]}" ] && [ ! -e "${values[2]}" ] && ! compgen -G "$(run_folder "$@")/checkpoints/step-*.h5" > /dev/null; then
        echo "${values[2]}: no such file, but model.weights names it; give a checkpoint of an earlier run: --set model.weights=FILE" >&2
        exit 2
    fi
    if [ -n "${values[3]}" ] && [ ! -e "${values[3]}" ] && [ "${values[3]#*:}" = "${values[3]}" ]; then
        echo "${values[3]}: no such file, but task.classifier names it; give weights or a run folder: --set task.classifier=FILE" >&2
        exit 2
    fi
}

# run_folder ARGUMENTS...: where a run of $INPUT with these arguments lies.
run_folder() {
    local word before="" given=""
    for word in "$@"; do
        if [ "$before" = --run-dir ]; then given=$word; fi
        case $word in --run-dir=*) given=${word#*=} ;; esac
        before=$word
    done
    settings run.dir,run.name "$@"
    echo "${given:-${values[0]}/${values[1]}}"
}

# chain SCRIPT "STAGES" ARGUMENTS...: submit a job for each stage, each of which waits until the one before has succeeded.
chain() {
    local script=$1 stages=$2 stage before="" jobs=""
    shift 2
    for stage in $stages; do
        before=$(${SBATCH:-sbatch} --parsable ${before:+"--dependency=afterok:$before"} "$script" "$stage" "$@") || exit
        jobs="$jobs, $before ($stage)"
    done
    echo "jobs ${jobs#, }"
}

# launch VERB ARGUMENTS...: run it on all tasks, and leave with its exit code; requeue where the same command should go on.
launch() {
    local verb=$1 code cause
    shift
    DZHPC_STATUS=$(mktemp) # the program writes there: first that it listens to signals, at the end why it stopped
    export DZHPC_STATUS
    $LAUNCHER python -m "dzhpc.$verb" "$@" & # in the background: bash hears a signal in `wait`, but not while it runs a command
    pid=$!
    if [ -n "$warned" ]; then forward; fi
    while kill -0 "$pid" 2> /dev/null; do wait "$pid"; done # a signal ends the wait, not the job
    wait "$pid"
    code=$?
    cause=$(cat "$DZHPC_STATUS")
    rm -f "$DZHPC_STATUS"
    # 75: stopped with a checkpoint. Preemption requeues by itself if the site wants it, and a cancelled job must not come back.
    if [ "$code" = 75 ] && [ "$warned" != TERM ] && [ -n "$job" ]; then
        case $cause in
            SIGNAL | DEADLINE | WALLTIME)
                echo "requeue of job $job: $cause"
                scontrol requeue "$job" || echo "not requeued: submit the same command again" >&2
                ;;
        esac
    fi
    exit "$code"
}
