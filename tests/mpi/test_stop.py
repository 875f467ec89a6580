"""How a run ends before its time, and that the same command then finishes it with the bits of an undisturbed run."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from mpi_launch import Case, Result, assert_same, attributes, batch, bits, checkpoints, column, mpirun, sets, tensor

SLOW = ["objective.toml", *sets(task__function="userland:Slow", checkpoint__every_steps=2, stop__steps=25)]


@pytest.fixture(scope="module")
def ended(place):
    """Stops that need nobody outside, on two ranks, each followed by what the same command does next; results by name."""
    objective = lambda name, *args: Case(name, "train", ["objective.toml", "--run-dir", name.split("-")[0], *args])  # noqa: E731
    digits = lambda name, *args: Case(name, "train", ["digits.toml", "--run-dir", name.split("-")[0], *args])  # noqa: E731
    (place / "before").mkdir()
    (place / "before" / "STOP").touch()
    (place / "once").touch()
    stopped = sets(task__function="userland:Stopped", stop__steps=12)
    wall = sets(task__function="userland:Stopped", stop__steps=12, stop__walltime=0.5)
    accuracy = [*sets(stop__target_accuracy=0.05, stop__steps=20)]
    ended_job = {"SLURM_JOB_END_TIME": str(int(time.time()) + 60)}
    cases = [
        Case("undisturbed", "train", [*SLOW, "--run-dir", "undisturbed"]),
        objective("stopped", *stopped), objective("stopped-next", *stopped), objective("whole", *stopped),
        objective("before"), objective("before-next"),
        objective("walltime", *wall), objective("walltime-next", *wall, "--set", 'stop.walltime="0:01:00"'),
        objective("queries", *sets(stop__queries=41)), objective("queries-next", *sets(stop__queries=41)),
        digits("accuracy", *accuracy), digits("accuracy-next", *accuracy),
        Case("deadline", "train", ["objective.toml", "--run-dir", "deadline"], ended_job),
        objective("deadline-next", *sets(stop__steps=3)),
        objective("quiet", "--quiet", *sets(stop__steps=3)),
        objective("epochs", *sets(stop__epochs=3)), objective("epochs-next", *sets(stop__epochs=3)),
    ]  # fmt: skip
    return batch(2, place, cases)


def when(condition, process: subprocess.Popen, timeout: float = 60) -> None:
    """Wait until ``condition()``; fail if the program ends before."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, "the program ended too early"
        assert time.monotonic() < end, f"nothing within {timeout} s"
        time.sleep(0.02)


def step_of(place: Path, rank: int) -> int:
    text = (place / f"at.{rank}").read_text() if (place / f"at.{rank}").exists() else ""
    return int(text.split()[0]) if text else -1


@pytest.fixture(scope="module")
def disturbed(place, ended):
    """A run that was warned by a signal and one that lost a rank, on two ranks; then both continued on three: the results."""

    def disturb(name: str, rank: int, step: int, do) -> Result:
        for old in place.glob("at.*"):
            old.unlink()
        (place / "slow").touch()

        def meanwhile(process: subprocess.Popen) -> None:
            when(lambda: step_of(place, rank) >= step, process)
            do(process)

        result = mpirun(2, "train", *SLOW, "--run-dir", name, cwd=place, meanwhile=meanwhile)
        (place / "slow").unlink()
        if (place / name).exists():
            shutil.copytree(place / name, place / f"{name}-then")
        return result

    (place / "slow-start").touch()
    early = disturb("early", 0, 0, lambda process: os.kill(process.pid, signal.SIGUSR1))
    (place / "slow-start").unlink()
    results = {
        "early": early,
        "warned": disturb("warned", 0, 5, lambda process: os.kill(process.pid, signal.SIGUSR1)),
        "killed": disturb("killed", 1, 7, lambda _: os.kill(int((place / "at.1").read_text().split()[1]), signal.SIGKILL)),
    }
    (place / "accuracy" / "STOP").touch()
    next_ones = [Case(f"{name}-next", "train", [*SLOW, "--run-dir", name]) for name in ("early", "warned", "killed")]
    stopped = Case("stopped-again", "train", ["digits.toml", "--run-dir", "accuracy", *sets(stop__steps=27)])
    return results | batch(3, place, [*next_ones, stopped])


def test_signal_to_mpirun(place, disturbed):
    """A job system's warning: a checkpoint, 75; and the same command finishes the run."""
    first, then = disturbed["warned"], place / "warned-then"
    assert first.code == 75, first.err
    assert "Traceback" not in first.err
    stop = attributes(checkpoints(then)[-1], "state")["step"]
    assert 5 <= stop < 25
    assert f"stopped at step {stop}: signal received; {5 * stop} queries" in first.out
    assert column(then, "train/step") == list(range(1, stop + 1))
    assert disturbed["warned-next"].succeeded().out.startswith(f"restarting at step {stop} from ")
    assert_same(bits(place / "undisturbed"), bits(place / "warned"))


def test_signal_before_the_first_step(place, disturbed):
    """Data and model may take minutes to load: a warning in that time counts, too."""
    assert disturbed["early"].code == 75, disturbed["early"].err
    assert re.search(r"stopped at step \d: signal received", disturbed["early"].out)
    disturbed["early-next"].succeeded()
    assert_same(bits(place / "undisturbed"), bits(place / "early"))


def test_killed_rank(place, disturbed):
    """A crash without warning: the job ends, and the same command continues from the last checkpoint."""
    assert disturbed["killed"].code == 128 + signal.SIGKILL
    kept = attributes(checkpoints(place / "killed-then")[-1], "state")["step"]
    assert kept >= 6 and kept % 2 == 0
    assert disturbed["killed-next"].succeeded().out.startswith(f"restarting at step {kept} from ")
    assert_same(bits(place / "undisturbed"), bits(place / "killed"))


def test_stop_file(place, ended):
    result = ended["stopped"].succeeded()
    stop = int(re.search(r"stopped at step (\d+): STOP file found", result.out)[1])
    assert 4 <= stop < 12
    assert not (place / "stopped" / "STOP").exists()
    assert f"restarting at step {stop} from " in ended["stopped-next"].succeeded().out
    ended["whole"].succeeded()
    assert_same(bits(place / "whole"), bits(place / "stopped"))


def test_stop_file_before_the_first_step(place, ended):
    assert "stopped at step 0: STOP file found" in ended["before"].succeeded().out
    assert "starting afresh in before" in ended["before-next"].succeeded().out
    assert column(place / "before", "train/step") == list(range(1, 61))


def test_stop_file_just_after_a_restart(place, disturbed):
    """Stopped at a step whose evaluation is on record already: no rank may wait for another to evaluate."""
    assert "stopped at step 7: STOP file found" in disturbed["stopped-again"].succeeded().out
    assert column(place / "accuracy", "train/step") == list(range(1, 8))
    assert column(place / "accuracy", "eval/step") == [7]
    assert not (place / "accuracy" / "STOP").exists()


def test_walltime(place, ended):
    assert ended["walltime"].code == 75
    stop = int(re.search(r"stopped at step (\d+): stop.walltime reached", ended["walltime"].out)[1])
    assert 1 <= stop < 12
    assert f"restarting at step {stop} from " in ended["walltime-next"].succeeded().out
    assert_same(bits(place / "whole", but=("config",)), bits(place / "walltime", but=("config",)))


def test_deadline_of_the_job(place, ended):
    assert ended["deadline"].code == 75
    assert "the job's time limit is near" in ended["deadline"].out
    ended["deadline-next"].succeeded()
    assert column(place / "deadline", "train/step") == [1, 2, 3]


def test_queries(place, ended):
    assert "stopped at step 9: stop.queries reached; 45 queries" in ended["queries"].succeeded().out
    assert "nothing left to do: stop.queries reached at step 9" in ended["queries-next"].succeeded().out
    assert column(place / "queries", "train/queries") == [5 * k - 1 for k in range(1, 10)]


def test_target_accuracy(place, ended):
    result = ended["accuracy"].succeeded()
    assert "stopped at step 7: stop.target_accuracy reached" in result.out
    assert column(place / "accuracy", "eval/step") == [7]
    assert column(place / "accuracy", "eval/accuracy")[0] >= 0.05
    assert "nothing left to do: stop.target_accuracy reached at step 7" in ended["accuracy-next"].succeeded().out


def test_all_epochs(place, ended):
    assert "stopped at step 3: all epochs done; 15 queries" in ended["epochs"].succeeded().out
    assert "nothing left to do: all epochs done at step 3" in ended["epochs-next"].succeeded().out
    assert tensor(checkpoints(place / "epochs")[-1], "optimizer/momentum_buffer/theta").shape == (3,)


def test_quiet(place, ended):
    assert ended["quiet"].succeeded().out == ""
    assert "stopped at step 3: stop.steps reached" in (place / "quiet" / "log.txt").read_text()
