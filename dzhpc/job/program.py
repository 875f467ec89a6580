"""Programs that a rank starts: their environment, their scratch folder, their time limit; see :mod:`dzhpc.job.keeper`."""

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from dzhpc.errors import InputError, OutsideError
from dzhpc.job import keeper, process

PREFIX = "dzhpc-scratch-"
LAUNCHERS = (  # whose variables say what this rank is in its job; a program that is an MPI job itself would take them for its own
    "OMPI_", "OPAL_", "PMIX_", "PMI_", "PRTE_", "ORTE_", "MV2_COMM_", "MPI_LOCAL", "MPIR_", "HYDI_", "HYDRA_", "ALPS_", "PALS_",
    "JSM_", "FLUX_", "SLURM_", "DZHPC_STATUS",
)  # fmt: skip
USERS = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_MCA_", "PRTE_MCA_", "PMIX_MCA_")  # of these, what the user has set, but for
MPIRUNS = ("num_procs", "initial_wdir", "cpu_type", "PREFIXES", "ess", "orte", "prte", "pmix", "shmem", "schizo")  # mpirun's
SLURMS = ("SLURM_JOB_ID", "SLURM_CONF", "SLURM_WORKING_CLUSTER")  # by which srun finds this job; mpirun looks for SLURM_JOBID
SLACK = 30.0  # seconds beyond a time limit after which a keeper that says nothing is given up


def environment() -> dict[str, str]:
    """This process's environment without what its launcher has put there; DZHPC_RANK says the rank.

    A program then runs where this rank does, on its share of the node. ``srun`` finds the job, and no step of it.
    """

    def passes(name: str) -> bool:
        if name.startswith(USERS):
            return not name.partition("_MCA_")[2].startswith(MPIRUNS)
        return name in SLURMS or not name.startswith(LAUNCHERS)

    return {name: value for name, value in os.environ.items() if passes(name)} | {"DZHPC_RANK": str(process.launch_rank())}


class Keeper:
    """Starts programs for this rank, one at a time, in a scratch folder of its own, which is there as long as this object.

    files: numbers of open files that the one program gets which this keeper starts.
    Raises InputError where there can be no scratch folder.
    """

    def __init__(self, base: Path | None = None, files: Sequence[int] = ()):
        started = process.identity()
        name = f"{PREFIX}{started['host']}-{started['pid']}-{started['started']}-"
        try:
            self.folder = Path(tempfile.mkdtemp(prefix=name, dir=base)).resolve()
        except OSError as error:
            raise InputError(f"no scratch folder can be made in {base or tempfile.gettempdir()} ({error.strerror})") from None
        self._files = list(files)
        words = [sys.executable, "-I", "-S", keeper.__file__, str(self.folder)]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            pass_fds=self._files, env=environment(), cwd="/", bufsize=0,
        )  # fmt: skip
        self.close = weakref.finalize(self, _close, self._process, self.folder, os.getpid())

    def run(self, command: Sequence[str], folder: Path, seconds: float) -> int:
        """The program's exit code, or minus the signal that ended it. Raises OutsideError, also when ``seconds`` are over."""
        self.ask(command, folder, seconds, environment())
        if not select.select([self._process.stdout], [], [], seconds + keeper.GRACE + keeper.STUBBORN + SLACK)[0]:
            self.close()
        line = b"" if self._process.stdout.closed else self._process.stdout.readline()
        if not line:
            self.close()
            raise OutsideError("the process that watched over it has ended")
        answer = json.loads(line)
        if "errno" in answer:
            script = "; if it is a script, is its first line right?" if answer["errno"] in (errno.ENOENT, errno.ENOEXEC) else ""
            raise OutsideError(f"cannot be started ({os.strerror(answer['errno'])}{script})")
        if "late" in answer:
            raise OutsideError(f"had not ended after {seconds:g} s (task.timeout), and was killed")
        return os.waitstatus_to_exitcode(answer["status"])

    def ask(self, command: Sequence[str], folder: Path, seconds: float, variables: Mapping[str, str]) -> None:
        """Let a program start. Raises OutsideError."""
        question = {"command": list(command), "environment": variables, "folder": str(folder), "seconds": seconds}
        try:
            self._process.stdin.write(json.dumps(question | {"pass": self._files}).encode() + b"\n")
        except (OSError, ValueError):
            self.close()
            raise OutsideError("the process that watches over it has ended") from None


def _close(process: subprocess.Popen, folder: Path, owner: int) -> None:
    """Let a keeper end all that it has started and remove its folder; a fork of the rank leaves it alone."""
    if os.getpid() != owner:
        return
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(keeper.GRACE + keeper.STUBBORN + SLACK)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
    shutil.rmtree(folder, ignore_errors=True)


def sweep(base: Path | None = None) -> None:
    """Remove scratch folders of ranks of this user on this host that were killed together with their keepers, as Slurm does."""
    for folder in Path(base or tempfile.gettempdir()).glob(f"{PREFIX}{socket.gethostname()}-*"):
        pid, started, _ = folder.name.removeprefix(f"{PREFIX}{socket.gethostname()}-").rsplit("-", 2)
        with contextlib.suppress(OSError, ValueError):
            if folder.stat().st_uid == os.getuid() and process.start_of(int(pid)) != started:
                shutil.rmtree(folder, ignore_errors=True)


def described(code: int) -> str:
    """What an exit code says."""
    if code >= 0:
        return f"left with exit code {code}"
    names = {each.value: each.name for each in signal.Signals}
    return f"was ended by {names.get(-code, f'signal {-code}')}"
