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

# Triton and Inductor compile into these folders: on a parallel file system thousands of small files from every rank are slow,
# and two nodes of different processors must not share machine code. A node's own disk it is, one folder a user.
node_local=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/dzhpc-$(id -u)
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$node_local/inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$node_local/triton}

# HDF5 locks files by flock, which many parallel file systems refuse on compute nodes. dzhpc has one writer, which renames
# finished files into place, and opens without locks: HDF5_USE_FILE_LOCKING need not be set here.

# One thread a rank, as run.threads says, before any library starts its own pool: N ranks times N threads would fight for N cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# When Slurm will end the job, in seconds since 1970; new versions say so themselves.
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    SLURM_JOB_END_TIME=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s 2> /dev/null) && export SLURM_JOB_END_TIME
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

# setting SECTION KEY ARGUMENTS...: the value that a run of $INPUT with these arguments will see, as far as it is written plainly.
setting() {
    local section=$1 key=$2 value word
    shift 2
    value=$(sed -n "/^\[$section\]/,/^\[/s/^$key *= *[\"']\{0,1\}\([^\"'#]*[^\"'# ]\).*/\1/p" "$INPUT" | tail -n 1)
    for word in "$@"; do
        case $word in "$section.$key="* | "--set=$section.$key="*) value=${word#*"$key="} ;; esac
    done
    value=${value#[\"\']}
    echo "${value%[\"\']}"
}

# need_input ARGUMENTS...: fail in the first second, not in the first hour, where the input file or its data are missing.
need_input() {
    local name root
    if [ ! -f "$INPUT" ]; then
        echo "$INPUT: no such input file in $PWD; submit from the folder that holds inputs/ and slurm/, or set INPUT" >&2
        exit 2
    fi
    name=$(setting data name "$@")
    root=$(setting data root "$@")
    root=${root:-${DZHPC_DATA:-data}}
    if [ "$name" = cifar10 ] && [ ! -e "$root/cifar10.h5" ] && [ ! -d "$root/cifar10/cifar-10-batches-py" ]; then
        echo "$root: no CIFAR-10 there (cifar10.h5); get it on a node with network access: python -m dzhpc.fetch cifar10 --root $root" >&2
        exit 2
    fi
    name=$(setting model weights "$@")
    if [ -n "$name" ] && [ ! -e "$name" ]; then
        echo "$name: no such file, but model.weights names it; give a checkpoint of an earlier run: --set model.weights=FILE" >&2
        exit 2
    fi
    name=$(setting task classifier "$@")
    if [ -n "$name" ] && [ ! -e "$name" ] && [ "${name#*:}" = "$name" ]; then
        echo "$name: no such file, but task.classifier names it; give weights or a run folder: --set task.classifier=FILE" >&2
        exit 2
    fi
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
    if [ "$code" = 75 ] && [ "$warned" != TERM ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        case $cause in
            SIGNAL | DEADLINE | WALLTIME)
                echo "requeue of job $SLURM_JOB_ID: $cause"
                scontrol requeue "$SLURM_JOB_ID" || echo "not requeued: submit the same command again" >&2
                ;;
        esac
    fi
    exit "$code"
}
