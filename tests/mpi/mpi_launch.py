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

import h5py
import numpy as np

BESIDE = Path(sys.executable).parent / "mpirun"
MPIRUN = str(BESIDE) if BESIDE.exists() else shutil.which("mpirun")
SHARED_MEMORY = "OMPI_MCA_btl_sm_backing_directory"  # the folder for it; /dev/shm without
NO_LISTENER = "The PMIx server's listener thread failed to start"  # mpirun could not open its own port; we were not started
(ABORTED, HUNG) = (-1, -2)  # what became of a case of a batch
TIMINGS = {"train/step_s", "train/comm_s", "train/peak_bytes"}  # and memory: they depend on a rank's slice
OF_THE_RUN = {"created", "state/wall_time_s", "state/run_uuid"}  # attributes that tell two runs apart, and no numbers


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
    return launched([MPIRUN, "-n", ranks, sys.executable, "-m", f"dzhpc.{verb}", *args], cwd, **options)


def launched(command: Sequence[object], cwd: Path, **options) -> Result:
    """:func:`run` for a command with mpirun in it: once more where mpirun failed before it started anything."""
    result = run(command, cwd, **options)
    return run(command, cwd, **options) if NO_LISTENER in result.err else result


def batch(ranks: int, cwd: Path, cases: Sequence[Case], timeout: float = 240) -> dict[str, Result]:
    """Several command lines in one MPI job (see several.py): name -> result. All ranks must leave with one exit code.

    A case that ends the whole job, or that hangs, has the code ABORTED or HUNG; those after it get another job.
    """
    files = Path(tempfile.mkdtemp(dir=cwd, prefix=f"job-{ranks}-"))
    job = [{"name": c.name, "verb": c.verb, "args": [str(a) for a in c.args], "env": dict(c.env)} for c in cases]
    (files / "job.json").write_text(json.dumps(job))
    command = [MPIRUN, "-n", ranks, sys.executable, Path(__file__).with_name("several.py"), files / "job.json"]
    code, noise = ABORTED, ""
    try:
        noise = launched(command, cwd, timeout=timeout).err
    except AssertionError:
        code = HUNG
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
