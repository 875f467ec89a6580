"""A real Slurm on this machine: munged, slurmctld and slurmd in the foreground on free ports, all files in one folder."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
DEBIAN = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge libpmix-dev"
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "SIGNALING")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a requeued job may start once its old credential has expired: 6 s instead of 121
AuthInfo=socket={d}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd.pid
SlurmctldLogFile={d}/slurmctld.log
SlurmdLogFile={d}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
# more cores than the machine has
SlurmdParameters=config_overrides
GresTypes=gpu
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
KillWait=4
UnkillableStepTimeout=60
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=64000 Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs of Slurm that are not installed here."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class Cluster:
    """The running Slurm; ``env`` makes the client commands find it."""

    def __init__(self, env: Mapping[str, str]):
        self.env = dict(env)

    def command(self, *words: object, **options) -> str:
        """The output of a client command, which must succeed."""
        done = subprocess.run(
            [str(w) for w in words], env=self.env, capture_output=True, text=True, timeout=60, check=False, **options
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: object, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """The id of a new job."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, words)], env=self.env | dict(env or {}), cwd=cwd, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """The fields of ``scontrol show job``, such as JobState, ExitCode, Restarts."""
        return dict(word.split("=", 1) for word in self.command("scontrol", "show", "job", "-o", job).split() if "=" in word)

    def end_of(self, job: str, timeout: float = 120) -> dict[str, str]:
        """Wait for a job to be over, requeues included; its fields."""
        return self.when(job, lambda fields: fields["JobState"] not in ACTIVE, timeout)

    def when(self, job: str, condition, timeout: float = 60) -> dict[str, str]:
        """Wait until ``condition(fields)`` holds; the fields."""
        end = time.monotonic() + timeout
        while True:
            fields = self.show(job)
            if condition(fields):
                return fields
            assert time.monotonic() < end, f"job {job} after {timeout} s: {fields}"
            time.sleep(0.1)


@contextlib.contextmanager
def one_node() -> Iterator[Cluster]:
    """Start it, and stop it with all its jobs."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munged refuses a socket below a folder that others may not enter
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    ports = {"controller": _free_port(), "daemon": _free_port()}
    (folder / "slurm.conf").write_text(CONF.format(host=host, d=folder, user=getpass.getuser(), **ports))
    (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu {_fake_gpus(folder)}\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    env = dict(os.environ, SLURM_CONF=str(folder / "slurm.conf"), PATH=os.environ["PATH"] + ":/usr/sbin:/sbin")
    for name in [name for name in env if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
        del env[name]  # these tests may themselves run in a job
    daemons = []

    def up(*command: str) -> None:
        with open(folder / f"{command[0]}.out", "w") as out:
            options = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, "start_new_session": True}
            daemons.append(subprocess.Popen(command, env=env, **options))

    try:
        files = [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
        up("munged", "-F", f"--key-file={key}", f"--socket={folder}/munge.socket", *files)
        _until((folder / "munge.socket").exists, folder)
        up("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        up("slurmd", "-D", "-f", str(folder / "slurm.conf"))
        state = lambda: subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True).stdout.strip()  # noqa: E731
        _until(lambda: state() == "idle", folder)
        yield Cluster(env)
    finally:
        subprocess.run(["scancel", "-u", getpass.getuser()], env=env, capture_output=True)
        with contextlib.suppress(AssertionError):
            _until(lambda: not subprocess.run(["squeue", "-h"], env=env, capture_output=True, text=True).stdout.strip(), folder)
        for daemon in reversed(daemons):
            _stop(daemon)
        shutil.rmtree(folder, ignore_errors=True)


def _fake_gpus(folder: Path) -> str:
    """Eight copies of /dev/null: Slurm then gives them out like GPUs. Without root they are only counted."""
    try:
        for k in range(8):
            os.mknod(folder / f"gpu{k}", 0o600 | 0o020000, os.makedev(1, 3))
    except PermissionError:
        return "Count=8"
    return f"File={folder}/gpu[0-7]"


def _until(condition, folder: Path, timeout: float = 30) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            files = [*sorted(folder.glob("*.log")), *sorted(folder.glob("*.out"))]
            logs = "\n".join(f"{path.name}: {path.read_text()[-800:]}" for path in files)
            raise AssertionError(f"Slurm: nothing within {timeout} s\n{logs}")
        time.sleep(0.05)


def _stop(daemon: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            daemon.send_signal(number)
            daemon.wait(10)
            return


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
