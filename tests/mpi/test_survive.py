"""What a cluster does to a job: steps left unfinished, launchers killed, disks full, two jobs on one folder."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from chaos import ranks_of
from mpi_launch import (
    SHARED_MEMORY,
    Case,
    Result,
    assert_same,
    attributes,
    batch,
    bits,
    checkpoints,
    column,
    contents,
    mpirun,
    sets,
    tensor,
)

SOON = sets(run__deadline_margin=0.6)  # a step may go on for 0.3 s after it was asked to stop
LONG = ["objective.toml", *sets(task__function="userland:LongStep", zo__mu=1e-3, optim__lr=1e-3, stop__steps=6)]
RGE = sets(zo__estimator="rge", zo__q=24)
SCORES = sets(sparsity__ratio=0.5, sparsity__q=24, sparsity__redraw_epochs=2, sparsity__pattern="regrasp")
NET = [
    "own.toml",
    *sets(model__name="userland:LongNet", zo__engine="full", zo__difference="central", sparsity__ratio=0.1, stop__steps=3),
]
RUNS = {"cge": LONG, "rge": [*LONG, *RGE], "central": [*LONG, *sets(zo__difference="central")], "net": NET}
RUNS["shards"] = [*NET, *sets(data__shards=2)]


@pytest.fixture(scope="module", autouse=True)
def shared(place):
    """Where Open MPI keeps its shared memory in these tests: in /dev/shm other jobs come and go."""
    (place / "shm").mkdir()
    os.environ[SHARED_MEMORY] = str(place / "shm")
    yield place / "shm"
    del os.environ[SHARED_MEMORY]


def until(condition, what: str, timeout: float = 60):
    """Wait until ``condition()`` is true, and return it."""
    end = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {timeout} s: {what}"
        time.sleep(0.02)
    return found


def at(place: Path, rank: int, step: int) -> int | None:
    """The process of a rank, once it has written down that it is at ``step`` or later; the file may just be written."""
    path = place / f"at.{rank}"
    text = path.read_text().split() if path.exists() else []
    return int(text[1]) if len(text) == 2 and int(text[0]) >= step else None


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def train(place: Path, ranks: int, name: str, *args: object, env: dict | None = None, meanwhile=None) -> Result:
    """A run in one of the MPI jobs that are shared; it is no use where the job's own end matters."""
    case = Case(name, "train", [*args, "--run-dir", name], env or {})
    return batch(ranks, place, [case], timeout=90, meanwhile=meanwhile)[name]


def interrupted(place: Path, ranks: int, name: str, args: list, rank: int, step: int, after: float = 0.0) -> Result:
    """A run whose rank ``rank`` alone gets USR1 in a long step ``step``."""
    for old in place.glob("at.*"):
        old.unlink()
    (place / "long").touch()

    def meanwhile(_) -> None:
        process = until(lambda: (place / name / "log.txt").exists() and at(place, rank, step), f"step {step}")
        time.sleep(after)
        os.kill(process, signal.SIGUSR1)

    result = train(place, ranks, name, *args, *SOON, meanwhile=meanwhile)
    (place / "long").unlink()
    return result


@pytest.fixture(scope="module")
def stopped(place):
    """Runs that one rank's signal stopped in the middle of a step; and, by folder, how their newest checkpoints looked then."""
    results, partial = {}, {}

    def stop(name: str, kind: str, ranks: int, rank: int, step: int, after: float = 0.0) -> None:
        results[name] = interrupted(place, ranks, name, RUNS.get(kind, [*LONG, *SCORES]), rank, step, after)
        newest = checkpoints(place / name)[-1:]
        partial[name] = (newest[0].name, tensor(newest[0], "partial/done")) if newest and has_partial(newest[0]) else None

    stop("cge", "cge", 2, 1, 2)
    stop("rge", "rge", 2, 1, 2)
    stop("central", "central", 3, 2, 1, 0.2)
    stop("net", "net", 2, 0, 1, 0.7)
    stop("shards", "shards", 3, 1, 1, 0.7)
    stop("scores", "scores", 2, 0, 2, 0.6)
    results["cge-2"] = interrupted(place, 3, "cge", LONG, 0, 2)
    partial["cge-2"] = (checkpoints(place / "cge")[-1].name, tensor(checkpoints(place / "cge")[-1], "partial/done"))
    return results, partial


def has_partial(path: Path) -> bool:
    return any(place.startswith("partial") for place in contents(path))


@pytest.fixture(scope="module")
def continued(place, stopped):
    """The same command lines on one rank, and undisturbed runs: the results."""
    kinds = RUNS | {"scores": [*LONG, *SCORES]}
    cases = [Case(f"{name}-rest", "train", [*args, "--run-dir", name, *SOON]) for name, args in kinds.items()]
    cases += [Case(f"{name}-whole", "train", [*args, "--run-dir", f"whole-{name}", *SOON]) for name, args in kinds.items()]
    return batch(1, place, cases)


@pytest.mark.parametrize("name", ["cge", "rge", "central", "net", "shards"])
def test_a_long_step_is_left_unfinished_and_completed(place, stopped, continued, name):
    """A signal to one rank only: all stop between two chunks, the differences known so far are kept, the bits are the same."""
    result, (file, done) = stopped[0][name], stopped[1][name]
    assert result.code == 75, result.err
    assert "Traceback" not in result.err
    step = int(re.search(r"step (\d+) left unfinished", result.out)[1]) - 1
    assert file == f"step-{step:08d}.h5"
    assert 0 < done.sum() < len(done)
    rest = continued[f"{name}-rest"].succeeded()
    said = f"restarting at step {step} from {name}/checkpoints/{file}\ncompleting step {step + 1}: "
    assert rest.less_the_check().startswith(said)
    assert not has_partial(checkpoints(place / name)[-1])
    assert_same(bits(place / f"whole-{name}"), bits(place / name))


def test_a_step_left_unfinished_twice(stopped):
    (file, once), (file2, twice) = stopped[1]["cge"], stopped[1]["cge-2"]
    assert stopped[0]["cge-2"].code == 75
    assert file == file2
    assert (twice >= once).all() and once.sum() < twice.sum() < len(twice)


def test_scoring_left_unfinished(place, stopped, continued):
    """Scores are not kept: the restart makes them anew."""
    assert stopped[0]["scores"].code == 75, stopped[0]["scores"].err
    assert "stopped at step 2: signal received" in stopped[0]["scores"].out
    assert "left unfinished" not in stopped[0]["scores"].out
    assert stopped[1]["scores"] is None
    continued["scores-rest"].succeeded()
    assert_same(bits(place / "whole-scores"), bits(place / "scores"))


def test_the_stop_file_in_a_long_step(place):
    """Exit 0, and the step is completed by the next start all the same."""
    (place / "long").touch()
    args = [*LONG, *SOON, *sets(run__deadline_margin=0.2)]
    for old in place.glob("at.*"):
        old.unlink()

    def meanwhile(_) -> None:
        until(lambda: at(place, 0, 1), "step 1")
        time.sleep(0.6)  # what comes first may be an evaluation
        (place / "file" / "STOP").touch()

    result = train(place, 1, "file", *args, meanwhile=meanwhile)
    (place / "long").unlink()
    assert result.succeeded().out.count("left unfinished") == 1
    assert not (place / "file" / "STOP").exists()
    assert "completing step" in train(place, 2, "file", *args).succeeded().out
    assert_same(bits(place / "whole-cge", but=("config",)), bits(place / "file", but=("config",)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_launcher(place, continued, shared, ranks):
    """SIGKILL to mpirun: its ranks end within seconds, shared memory is gone, and the folder can be continued at once."""
    for old in place.glob("at.*"):
        old.unlink()
    name, pids = f"launcher-{ranks}", []
    (place / "long").touch()

    def meanwhile(process: subprocess.Popen) -> None:
        pids.extend(until(lambda rank=rank: at(place, rank, 2), "step 2") for rank in range(ranks))
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: not any(map(alive, pids)), "the ranks' end", 20)

    args = [*LONG, *SOON, "--set", "checkpoint.every_steps=1"]
    result = mpirun(ranks, "train", *args, "--run-dir", name, cwd=place, meanwhile=meanwhile)
    (place / "long").unlink()
    assert result.code == -signal.SIGKILL and len(pids) == ranks
    assert list(shared.iterdir()) == []
    assert (place / name / "lock.json").exists()
    if ranks == 1:
        return
    rest = train(place, 2, name, *args).succeeded()
    assert f"took over the run folder from process {pids[0]} on host {socket.gethostname()}, which has ended" in rest.out
    assert not (place / name / "lock.json").exists()
    assert_same(bits(place / "whole-cge", but=("config",)), bits(place / name, but=("config",)))


@pytest.mark.parametrize("seconds", [0.2, 1.0])
def test_launcher_killed_while_libraries_load(place, seconds):
    """MPI has not begun yet, and could not even begin: two ranks would wait for ever, one would run on alone."""
    name = place / f"early-{seconds}"

    def meanwhile(process: subprocess.Popen) -> None:
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: not ranks_of(name), "the ranks' end", 20)

    assert mpirun(2, "train", *LONG, "--run-dir", name, cwd=place, meanwhile=meanwhile).code == -signal.SIGKILL
    assert not name.exists()


def test_root_dies_while_it_writes_a_checkpoint(place, shared):
    """At most the steps since the previous one are lost, and what it left is never taken for a checkpoint."""
    args = ["objective.toml", *sets(task__function="userland:DiesWriting", zo__estimator="rge", zo__q=2, zo__mu=1e-3)]
    args += sets(stop__steps=6, checkpoint__every_steps=1, optim__lr=1e-3)
    train(place, 1, "writing-whole", *args).succeeded()
    (place / "die").touch()
    assert mpirun(2, "train", *args, "--run-dir", "writing", cwd=place).code == 128 + signal.SIGKILL
    assert list(shared.iterdir()) == []
    folder = place / "writing"
    assert attributes(checkpoints(folder)[-1], "state")["step"] in (2, 3)  # the third was being written, or just renamed
    result = train(place, 1, "writing", *args).succeeded()
    assert re.match(r"restarting at step [23] from", result.out)
    assert not list(folder.rglob("*.tmp"))
    assert_same(bits(place / "writing-whole"), bits(folder))


def test_full_disk_for_a_while(place):
    """on_full = "continue": a warning for each checkpoint that is left out, and the run ends as if nothing had been."""
    args = ["objective.toml", *sets(task__function="userland:FullForAWhile", checkpoint__every_steps=1, stop__steps=9)]
    shutil.rmtree(place / "while", ignore_errors=True)
    result = train(place, 2, "while", *args, *sets(checkpoint__on_full="continue"))
    assert result.code == 0, result.err
    lines = result.err.splitlines()
    assert len(lines) == 4 and all("cannot be written" in line and "going on without this checkpoint" in line for line in lines)
    assert column(place / "while", "train/step") == list(range(1, 10))
    stopped = mpirun(2, "train", *args, "--run-dir", "full-stop", cwd=place)
    stopped.said_once(3, "full-stop/", "cannot be written")
    assert attributes(checkpoints(place / "full-stop")[-1], "state")["step"] == 1
    assert json.loads((place / "full-stop" / "launches" / "001.json").read_text())["state"] == "failed"


def test_two_jobs_on_one_run_folder(place):
    """The second refuses and says who is at work; it changes nothing, and the first goes on."""
    for old in place.glob("at.*"):
        old.unlink()
    (place / "long").touch()
    args, second = [*LONG, *SOON], []

    def meanwhile(_) -> None:
        until(lambda: at(place, 0, 1), "step 1")
        files = {p.name for p in (place / "both").rglob("*")}
        for more in ([], ["--restart", "never"]):
            second.append(train(place, 2, "both", *args, *more))
        assert files <= {p.name for p in (place / "both").rglob("*")}
        (place / "long").unlink()

    first = train(place, 1, "both", *args, env={"SLURM_JOB_ID": "4711"}, meanwhile=meanwhile)
    assert first.succeeded().out.count("stopped at step 6") == 1
    for result in second:
        line = result.said_once(4, "both: in use by process ", f"on host {socket.gethostname()} (Slurm job 4711)", "--run-dir")
        assert "both/lock.json" in line
    assert not list((place / "both").glob("previous-*"))
    assert_same(bits(place / "whole-cge"), bits(place / "both"))
