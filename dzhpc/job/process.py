"""What started this process, and what it owes its machine: to end with its launcher, and to be told from others."""

import contextlib
import ctypes
import os
import signal
import socket
import time
from pathlib import Path

STARTED = time.monotonic()  # as good as the start of this process: verbs import this module first of all
PR_SET_PDEATHSIG = 1
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MV2_COMM_WORLD_SIZE")
RANK_VARIABLES = (  # some launchers say this alone: srun --mpi=pmix, Cray's aprun and PALS, IBM's jsrun, Flux
    "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "ALPS_APP_PE", "PALS_RANKID", "JSM_NAMESPACE_RANK",
    "FLUX_TASK_RANK",
)  # fmt: skip
STEP_SIZE = "SLURM_STEP_NUM_TASKS"  # set by srun, not in a batch shell; SLURM_NTASKS is the allocation's and says nothing of us
LAUNCHERS = ("mpirun", "mpiexec", "prterun", "prted", "orterun", "orted", "hydra", "pmi_proxy", "slurmstepd", "srun")
SEGMENTS = "/sm_segment."  # Open MPI's shared memory: such a file for each rank, in /dev/shm unless it is told otherwise


def die_with_launcher() -> None:
    """Let the kernel kill this rank when its parent ends (Linux only): without their mpirun ranks would wait or run on for ever.

    SIGKILL, since Python handles no signal while it waits inside MPI. Does nothing in a process that no launcher started.
    """
    if not launched():
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = os.getppid()
        if parent == 1 and not Path("/proc/1/comm").read_text().startswith(LAUNCHERS):  # it ended before
            os.kill(os.getpid(), signal.SIGKILL)


def launched() -> bool:
    """Whether a launcher started this process as one of several, or as a rank of an MPI job."""
    return any(name in os.environ for name in (*SIZE_VARIABLES, *RANK_VARIABLES)) or _number(STEP_SIZE) > 1


def tasks_started() -> tuple[str, int]:
    """(the variable that says so, how many processes the launcher of this one started); ("", 1) without a launcher.

    A launcher of MPI counts before srun, which may have started the launcher.
    """
    said = [(name, _number(name)) for name in SIZE_VARIABLES if name in os.environ] or [(STEP_SIZE, _number(STEP_SIZE))]
    return max(said, key=lambda pair: pair[1]) if launched() else ("", 1)


def launch_rank() -> int:
    """The rank that the launcher gave this process, which MPI need not know of; 0 without a launcher."""
    return max(map(_number, (*RANK_VARIABLES, "SLURM_PROCID"))) if launched() else 0


def unsized_rank() -> tuple[str, int] | None:
    """(the variable that says so, rank), where a launcher calls this process a rank above 0, but does not say of how many."""
    if any(name in os.environ for name in SIZE_VARIABLES) or STEP_SIZE in os.environ:
        return None
    return next(((name, rank) for name in RANK_VARIABLES if (rank := _number(name))), None)


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def mapped_segments() -> list[str]:
    """The files of Open MPI's shared memory that this process has mapped and that still have a name."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    return sorted({line.split(maxsplit=5)[5] for line in lines if SEGMENTS in line and not line.endswith("(deleted)")})


def identity() -> dict[str, object]:
    """Host, process and Slurm job of this process, for :func:`is_gone`."""
    return {
        "host": socket.gethostname(), "pid": os.getpid(), "started": start_of(os.getpid()), "boot": _boot(),
        "job_id": job_id(), "restart_count": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }  # fmt: skip


def job_id() -> str | None:
    """This Slurm job by the name that means no other: ``12``, or ``12_7`` for a member of an array, one of which is 12, too."""
    array, member = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{member}" if array and member else os.environ.get("SLURM_JOB_ID")


def is_gone(other: dict[str, object]) -> bool | None:
    """Whether the process of an :func:`identity` has ended, as far as this host can see; None for a process of another host."""
    if other["host"] != socket.gethostname():
        return None
    return other["boot"] != _boot() or start_of(int(other["pid"])) != other["started"]


def start_of(pid: int) -> str | None:
    """When a process started, in ticks since boot: a process number alone may have been given to another since."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "unknown" if not Path("/proc/self/stat").exists() and _exists(pid) else None
    return None if fields[0] in "ZX" else fields[19]  # a zombie has ended


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
