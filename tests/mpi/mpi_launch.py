"""How the tests start the program, and what they compare: exit codes, lines, and the bits of two runs."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np

BESIDE = Path(sys.executable).parent / "mpirun"
MPIRUN = str(BESIDE) if BESIDE.exists() else shutil.which("mpirun")
SHARED_MEMORY = "OMPI_MCA_btl_sm_backing_directory"  # the folder for it; /dev/shm without
ENVIRONMENT = dict(os.environ)  # of the jobs that run batches: what single tests change is not meant for them
(ABORTED, HUNG) = (-1, -2)  # what became of a case of a batch
TIMINGS = {"train/step_s", "train/comm_s"}
OF_THE_RUN = {"created", "run_uuid", "state/wall_time_s", "state/run_uuid"}  # attributes that tell two runs apart, and no numbers


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float

    def error(self, code: int, *fragments: str) -> str:
        """The one line on standard error, holding all ``fragments``; asserts the exit code and that nothing else was said."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert self.code == code, f"exit code {self.code}, expected {code}; stderr:\n{self.err[-3000:]}"
        assert len(lines) == 1, f"expected one line on standard error, found {len(lines)}:\n{self.err[-3000:]}"
        missing = [text for text in fragments if text not in lines[0]]
        assert not missing, f"{missing} not in: {lines[0]}"
        return lines[0]

    def said_once(self, code: int, *fragments: str) -> str:
        """As :meth:`error`, but mpirun's own words may follow: exactly one line holds all ``fragments``, no traceback."""
        assert self.code == code, f"exit code {self.code}, expected {code}; stderr:\n{self.err[-3000:]}"
        lines = [line for line in self.err.splitlines() if all(text in line for text in fragments)]
        assert len(lines) == 1, f"expected one line with {fragments}, found {len(lines)}:\n{self.err[-3000:]}"
        assert "Traceback" not in self.err
        return lines[0]

    def succeeded(self) -> "Result":
        """Asserts exit code 0 and an empty standard error."""
        assert (self.code, self.err) == (0, ""), f"exit code {self.code}; stderr:\n{self.err[-3000:]}"
        return self

    def less_the_check(self) -> str:
        """Standard output without the lines of the check of the engine at the start."""
        return "".join(line for line in self.out.splitlines(keepends=True) if not line.startswith("engine "))


@dataclass
class Case:
    """One command line of :func:`batch`."""

    name: str
    verb: str
    args: Sequence[object]
    env: Mapping[str, str] = field(default_factory=dict)


def wait(process: subprocess.Popen, timeout: float) -> None:
    """Wait for the end; after ``timeout`` kill the whole process group, which fails the test."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        stop(process)
        raise AssertionError(f"no end after {timeout} s: {process.args}") from None


def stop(process: subprocess.Popen) -> None:
    """End a process group of ours: mpirun takes its ranks along when it is asked first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(5)


def run(
    command: Sequence[object],
    cwd: Path,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
    meanwhile: Callable[[subprocess.Popen], None] | None = None,
) -> Result:
    """Run a command with a time limit; ``meanwhile(process)`` may disturb it."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [str(part) for part in command], cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            env=dict(os.environ if env is None else env),
        )  # fmt: skip
        try:
            if meanwhile is not None:
                meanwhile(process)
            wait(process, timeout)
        finally:
            if process.poll() is None:
                stop(process)
        out.seek(0)
        err.seek(0)
        said = err.read().replace("\0", "")  # mpirun ends the stream of an aborted job with a NUL
        return Result(process.returncode, out.read(), said, time.monotonic() - start)


def mpirun(ranks: int, verb: str, *args: object, cwd: Path, **options) -> Result:
    """``mpirun -n RANKS python -m dzhpc.VERB ARGS...``"""
    return run([MPIRUN, "-n", ranks, sys.executable, "-m", f"dzhpc.{verb}", *args], cwd, **options)


class Job:
    """An MPI job whose ranks run batches of command lines one after another (see several.py), until the tests are over."""

    running: ClassVar[dict[int, "Job"]] = {}  # by the number of ranks

    def __init__(self, ranks: int):
        self._ranks, self._batches, self._heard = ranks, 0, 0
        self._folder = Path(tempfile.mkdtemp(prefix=f"job-{ranks}-"))
        words = [MPIRUN, "-n", ranks, sys.executable, Path(__file__).with_name("several.py"), self._folder, os.getpid()]
        with open(self._folder / "noise", "wb") as noise:
            self._process = subprocess.Popen(
                [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=noise, stderr=noise, start_new_session=True,
                env=ENVIRONMENT,
            )  # fmt: skip

    @classmethod
    def of(cls, ranks: int) -> "Job":
        """The running job of so many ranks, or a new one, also where it was killed from outside while it had nothing to do."""
        if ranks in cls.running and (code := cls.running[ranks]._process.poll()) is not None:
            print(f"{ranks} idle ranks ended ({code}): {cls.running[ranks].words()}", file=sys.stderr)
            cls.running[ranks].close()
        if ranks not in cls.running:
            cls.running[ranks] = cls(ranks)
        return cls.running[ranks]

    def processes(self) -> list[int]:
        """The ranks."""
        return children(self._process.pid)

    def words(self) -> str:
        """What mpirun and ranks outside a case have said since this was asked last."""
        said, start = (self._folder / "noise").read_bytes(), self._heard
        self._heard = len(said)
        return said[start:].decode().replace("\0", "")

    def run(self, files: Path, cwd: Path, cases: Sequence[Case], timeout: float, meanwhile: Callable | None) -> tuple[int, str]:
        """Run a batch, whose results come into ``files``: 0, or what became of the job, which then is over; and its words."""
        lines = [{"name": c.name, "verb": c.verb, "args": [str(a) for a in c.args], "env": dict(c.env)} for c in cases]
        work = {"cwd": str(cwd), "files": str(files), "cases": lines}
        (self._folder / "part").write_text(json.dumps(work))
        (self._folder / "part").rename(self._folder / f"{self._batches}.json")
        self._batches += 1
        code = HUNG
        try:
            if meanwhile is not None:
                meanwhile(self)
            code = self._wait(files, self._ranks * len(cases), timeout)
            return code, self.words()
        finally:
            if code != 0:
                stop(self._process)
                self.close()

    def _wait(self, files: Path, total: int, timeout: float) -> int:
        done, end = 0, time.monotonic() + timeout
        while done < total:
            if self._process.poll() is not None:
                return ABORTED
            if time.monotonic() > end:
                return HUNG
            time.sleep(0.02)
            if (now := len(list(files.glob("*.code.*")))) > done:
                done, end = now, time.monotonic() + timeout
        return 0

    @classmethod
    def close_all(cls) -> None:
        """Let all jobs end."""
        for job in cls.running.values():
            job.dismiss()
        for job in list(cls.running.values()):
            job.close()

    def dismiss(self) -> None:
        """Let the job end when it has nothing left to do."""
        (self._folder / "end").touch()

    def close(self) -> None:
        """Wait for the end of the job and remove its folder."""
        Job.running = {ranks: job for ranks, job in Job.running.items() if job is not self}
        self.dismiss()
        try:
            wait(self._process, 60)
        finally:
            shutil.rmtree(self._folder)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def batch(
    ranks: int, cwd: Path, cases: Sequence[Case], timeout: float = 400, meanwhile: Callable[[Job], None] | None = None
) -> dict[str, Result]:
    """Several command lines on the ranks of one MPI job: name -> result. All ranks must leave with one exit code.

    A case that ends the whole job, or for which ``timeout`` seconds are not enough, has the code ABORTED or HUNG; those after it
    get another job. ``meanwhile(job)`` may disturb the ranks.
    """
    files = Path(tempfile.mkdtemp(dir=cwd, prefix=f"job-{ranks}-"))
    code, noise = Job.of(ranks).run(files, cwd, cases, timeout, meanwhile)
    finished = [c.name for c in cases if len(list(files.glob(f"{c.name}.code.*"))) == ranks]
    results = {name: _collect(files, name, ranks) for name in finished}
    if len(finished) < len(cases):
        culprit = cases[len(finished)]
        said = "".join(p.read_text() for p in sorted(files.glob(f"{culprit.name}.err.*")))
        results[culprit.name] = Result(code, "", said + noise, 0.0)
        if len(finished) + 1 < len(cases):
            results |= batch(ranks, cwd, cases[len(finished) + 1 :], timeout)
    return results


def _collect(files: Path, name: str, ranks: int) -> Result:
    code, out, err = ([(files / f"{name}.{kind}.{r}").read_text() for r in range(ranks)] for kind in ("code", "out", "err"))
    codes = [json.loads(text) for text in code]
    assert len(set(codes)) == 1, f"{name}: the ranks left with {codes}"
    return Result(codes[0], "".join(out), "".join(err), 0.0)


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run folder, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*.h5"))


def contents(path: Path) -> dict[str, bytes | str]:
    """Every data set and attribute of a file, by its place; what tells two runs apart is left out, and timings are."""
    found: dict[str, bytes | str] = {}

    def take(place: str, item) -> None:
        if isinstance(item, h5py.Dataset) and place not in TIMINGS:
            value = item[()]
            array = np.asarray(value)
            found[place] = value if isinstance(value, bytes) else f"{array.dtype} {array.shape} ".encode() + (
                b"".join(array.ravel().tolist()) if array.dtype == object else array.tobytes()
            )  # fmt: skip
        for key, value in item.attrs.items():
            at = f"{place}/{key}".lstrip("/")
            if at not in OF_THE_RUN:
                found[at] = str(value.tolist() if isinstance(value, np.ndarray) else value)

    with h5py.File(path, "r") as file:
        take("", file)
        file.visititems(take)
    return found


def bits(folder: Path, but: tuple[str, ...] = ()) -> dict[str, bytes | str]:
    """The newest checkpoint of a run folder and its metrics, as :func:`contents`; ``but``: places that begin so are left out."""
    newest = checkpoints(folder)[-1]
    found = contents(newest) | {f"metrics/{place}": value for place, value in contents(folder / "metrics.h5").items()}
    return {place: value for place, value in found.items() if not place.startswith(but)} if but else found


def assert_same(a: Mapping, b: Mapping) -> None:
    """Every entry is there in both, with the same bits."""
    assert set(a) == set(b), f"only in one: {sorted(set(a) ^ set(b))}"
    different = [place for place in a if a[place] != b[place]]
    assert not different, f"{len(different)} of {len(a)} entries differ: {different[:8]}"


def column(folder: Path, name: str) -> list:
    """A column of metrics.h5, such as ``train/queries``."""
    with h5py.File(folder / "metrics.h5", "r") as file:
        return file[name][()].tolist()


def tensor(checkpoint: Path, place: str) -> np.ndarray:
    """A data set of a checkpoint, such as ``params/theta``."""
    with h5py.File(checkpoint, "r") as file:
        return file[place][()]


def attributes(path: Path, place: str = "/") -> dict[str, object]:
    """The attributes of a group."""
    with h5py.File(path, "r") as file:
        return dict(file[place].attrs.items())


def sets(**keys: object) -> list[str]:
    """``--set`` arguments from ``section__key=value``."""
    return [part for key, value in keys.items() for part in ("--set", f"{key.replace('__', '.')}={json.dumps(value)}")]
