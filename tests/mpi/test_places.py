"""Where a run lies: files that a restart does not need, user code that wanders or forks, names and paths of all kinds."""

import shutil

import numpy as np
import pytest
from mpi_launch import MPIRUN, Case, Result, batch, checkpoints, column, sets, tensor

USER = """
import multiprocessing, os, subprocess, sys, tempfile, time
import numpy as np


def value(theta):
    return float(((theta - 1) ** 2).sum())


class Wanders:  # into a folder that is not there any more at the next call
    def initial(self):
        os.chdir(tempfile.mkdtemp())
        return np.linspace(0.1, 1, 6)

    def __call__(self, thetas, step):
        os.chdir(tempfile.mkdtemp())
        return np.array([value(theta) for theta in thetas])


class Forks:
    def initial(self):
        return np.linspace(0.1, 1, 6)

    def __call__(self, thetas, step):
        fork = multiprocessing.get_context("fork")
        child = fork.Process(target=time.sleep, args=(1000,))
        child.start(), child.terminate(), child.join()
        with fork.Pool(2) as pool:
            return np.array(pool.map(value, list(thetas)))


class Launches:  # a program by an mpirun of its own, in the first call
    target = None

    def initial(self):
        return np.linspace(0.1, 1, 6)

    def __call__(self, thetas, step):
        if self.target is None:
            command = [os.environ["LAUNCHER"], "-n", "2", "--oversubscribe", sys.executable, "-c"]
            program = "from mpi4py import MPI; print(MPI.COMM_WORLD.size)"
            said = subprocess.run([*command, program], check=True, capture_output=True, text=True, timeout=60).stdout
            self.target = sum(int(size) for size in said.split()) / 4
        return ((thetas - self.target) ** 2).sum(1)
"""
SHORT = sets(stop__epochs=3, task__retries=0, checkpoint__every_steps=1)


@pytest.fixture(scope="module")
def done(place) -> dict[str, Result]:
    """First starts, whose files are then taken away."""
    (place / "user.py").write_text(USER)
    objective = lambda name, *args, env={}: Case(name, "train", ["objective.toml", *SHORT, *args], env)  # noqa: E731
    start = ["digits.toml", *sets(model__weights="start", sparsity__lpr="lpr.h5")]
    cases = [
        Case("lpr", "prune", ["digits.toml", "-o", "lpr.h5"]),
        Case("start", "train", ["digits.toml", "--run-dir", "start", *sets(stop__steps=1)]),
        Case("first", "train", [*start, "--run-dir", "again", *sets(stop__steps=3)]),
        Case("whole", "train", [*start, "--run-dir", "whole", *sets(stop__steps=6)]),
        objective("wanders", *sets(task__function="user:Wanders", run__name="rel")),
        objective("launches", *sets(task__function="user:Launches"), "--run-dir", "launches", env={"LAUNCHER": MPIRUN}),
        objective("forks", *sets(task__function="user:Forks"), "--run-dir", "forks"),
    ]
    found = batch(2, place, cases)
    shutil.rmtree(place / "start")
    (place / "lpr.h5").unlink()
    home = {"HOME": str(place / "home"), "SCRATCH": str(place / "fast")}
    cases = [
        Case("again", "train", [*start, "--run-dir", "again", *sets(stop__steps=5)]),
        Case("again-elsewhere", "train", ["digits.toml", "--run-dir", "again", *sets(model__weights="moved", stop__steps=6)]),
        Case("never-again", "train", [*start, "--run-dir", "again", "--restart", "never"]),
        Case("fresh", "train", [*start, "--run-dir", "fresh"]),
        objective("wanders-again", *sets(task__function="user:Wanders", run__name="rel", stop__epochs=3, stop__steps=2)),
        Case("home", "train", ["objective.toml", *SHORT, *sets(run__dir="~/runs", run__name="$A_^b")], home | {"DRAW": "1"}),
        Case("scratch", "train", ["objective.toml", *SHORT, "--run-dir=$SCRATCH/x"], home),
        Case("unset", "train", ["objective.toml", "--run-dir=$NOWHERE/x"]),
    ]
    return found | batch(2, place, cases)


def test_a_restart_needs_neither_starting_weights_nor_ratios(place, done):
    for name in ("first", "whole", "again", "again-elsewhere"):
        done[name].succeeded()
    assert done["again"].out.startswith("restarting at step 3 from again/checkpoints/step-00000003.h5")
    assert column(place / "again", "train/step") == column(place / "whole", "train/step") == [1, 2, 3, 4, 5, 6]
    ours, theirs = (tensor(checkpoints(place / name)[-1], "params/fc.weight") for name in ("again", "whole"))
    assert (ours == theirs).all()


@pytest.mark.parametrize("name", ["never-again", "fresh"])
def test_a_first_start_needs_them(place, done, name):
    done[name].error(2, "model.weights = start: cannot be read (No such file or directory)")
    assert len(checkpoints(place / "again")) and not (place / "fresh").exists()


def test_user_code_may_change_the_working_directory(place, done):
    done["wanders"].succeeded()
    assert len(checkpoints(place / "runs" / "rel")) == 3 and (place / "runs" / "rel" / "report" / "report.md").exists()
    assert "starting afresh in runs/rel\n" in done["wanders"].out
    assert "nothing left to do" in done["wanders-again"].succeeded().out


def test_user_code_may_fork(place, done):
    done["forks"].succeeded()
    assert column(place / "forks", "train/step") == [1, 2, 3]


def test_user_code_may_start_mpi_jobs(place, done):
    done["launches"].succeeded()
    expected = ((np.linspace(0.1, 1, 6) - 1) ** 2).sum()  # by two ranks
    assert column(place / "launches", "train/loss")[0] == pytest.approx(expected)


def test_paths_are_expanded_and_names_are_not(place, done):
    done["home"].succeeded()
    done["scratch"].succeeded()
    assert (place / "home" / "runs" / "$A_^b" / "report" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(checkpoints(place / "home" / "runs" / "$A_^b")) == 3 and len(checkpoints(place / "fast" / "x")) == 3
    assert done["unset"].code == 2 and "argument --run-dir: $NOWHERE/x: the variable NOWHERE is not set" in done["unset"].err
    assert not (place / "~").exists() and not (place / "$NOWHERE").exists()
