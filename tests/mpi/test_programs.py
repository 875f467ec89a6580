"""Programs as black boxes, over ranks: the bits of the same loss in Python, failures, kills, MPI solvers, all kinds of tasks."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
from mpi_launch import MPIRUN, Case, assert_same, batch, bits, column, run, sets

from dzhpc.job import process

BOWL = """
import json, os, sys, time
theta = json.load(open("theta.json"))["theta"]
here, rank = sys.argv[1], os.environ["DZHPC_RANK"]
with open(f"{here}/calls.{rank}", "a") as calls:
    calls.write(f"{os.getpid()}\\n")
if rank == "1" and os.path.exists(f"{here}/outage") and len(open(f"{here}/calls.1").readlines()) > 9:
    print("no license left", file=sys.stderr)
    sys.exit(7)
if os.path.exists(f"{here}/slow") and len(open(f"{here}/calls.{rank}").readlines()) > 9:
    open(f"{here}/hangs.{rank}", "w").write(str(os.getpid()))
    time.sleep(600)
print("loss", theta[0] ** 2 + 2 * (theta[1] - 1) ** 2 + theta[2] ** 4 - theta[2])
"""
PYTHON = """
import numpy as np
class Loss:
    def initial(self):
        return [0.5, 0.0, -0.25]
    def __call__(self, thetas, step):
        return [a**2 + 2 * (b - 1) ** 2 + c**4 - c for a, b, c in thetas.tolist()]
def step(states, parameters):
    return states - 0.1 * parameters[:, None].astype(np.float32) * (states - np.roll(states, 1, 1))
def redder(images):
    p = 1 / (1 + np.exp(-10 * (images[:, 1].mean((1, 2)) - images[:, 0].mean((1, 2)))))
    return np.stack([1 - p, p], 1)
def reference(nu):
    u = [np.sin(np.arange(8) * np.pi / 4)]
    while len(u) < 4:
        u.append(u[-1] - 0.09 * nu * (u[-1] - np.roll(u[-1], 1)))
    return np.array(u)
"""
OBJECTIVE = """
[task]
kind = "objective"
[zo]
mu = 1e-3
[sparsity]
ratio = 0.0
[optim]
lr = 0.02
momentum = 0.5
weight_decay = 0.0
warmup_epochs = 0
[stop]
epochs = 6
[checkpoint]
every_steps = 1
"""
PROGRAM = """
retries = 0
initial = { theta = [0.5, 0.0, -0.25] }
template = "bowl.py"
input = "theta.json"
pattern = 'loss (\\S+)'
"""
SUM = """
import sys
from mpi4py import MPI
print("sum", MPI.COMM_WORLD.allreduce((MPI.COMM_WORLD.rank + 1) * float(sys.argv[1])), MPI.COMM_WORLD.size, flush=True)
"""
STEP = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
from inpython import step
np.save("next.npy", step(np.load("state.npy")[None], np.array([float(sys.argv[2])]))[0])
"""
SOL = """
[task]
kind = "sol"
reference = "inpython:reference"
unroll = 2
warm_up = 0
frames = 4
train_parameters = [0.5]
valid_parameters = [1.0]
test_parameters = [0.8]
[model]
name = "corrector"
widths = []
[data]
path = "ring.h5"
name = "ring"
batch_size = 1
[zo]
mu = 1e-3
engine = "full"
[sparsity]
ratio = 0.0
[stop]
epochs = 1
steps = 1
"""
REDDER = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
from inpython import redder
np.save("p.npy", redder(np.load("image.npy")))
"""
DEFENSE = """
[task]
kind = "defense"
[model]
name = "dncnn"
depth = 3
width = 2
trainable = ["model.4.*"]
[data]
name = "userland:tiles"
batch_size = 10
[zo]
engine = "full"
mu = 1e-3
[sparsity]
ratio = 0.0
[stop]
epochs = 1
steps = 1
"""


def program(name: str, *words: object, **keys) -> list[str]:
    return ["program.toml", "--run-dir", name, *sets(task__command=[sys.executable, "bowl.py", *map(str, words)], **keys)]


@pytest.fixture(scope="module")
def work(place):
    """The folder of the runs, with all that they need."""
    (place / "scratch").mkdir()
    for name, text in {"bowl.py": BOWL, "inpython.py": PYTHON, "sum.py": SUM, "step.py": STEP, "redder.py": REDDER}.items():
        (place / name).write_text(text)
    (place / "program.toml").write_text(OBJECTIVE.replace('"objective"\n', f'"objective"\nscratch = "{place}/scratch"{PROGRAM}'))
    (place / "inpython.toml").write_text(OBJECTIVE.replace('"objective"', '"objective"\nfunction = "inpython:Loss"'))
    (place / "sol.toml").write_text(SOL)
    (place / "guard.toml").write_text(DEFENSE)
    (place / "outage").touch()
    return place


@pytest.fixture(scope="module")
def two(work):
    """Results of runs on two ranks."""
    redder = {"task__command": [sys.executable, "redder.py", str(work)], "task__template": "redder.py", "task__batched": True,
              "task__input": "image.npy", "task__result": "p.npy"}  # fmt: skip
    step = {"task__template": "step.py", "task__result": "next.npy"}
    one = sets(**step, task__command=[sys.executable, "step.py", str(work), "{parameter}"], task__input="state.npy")
    cases = [
        Case("down", "train", program("down", work)),
        Case("python", "train", ["inpython.toml", "--run-dir", "python"]),
        Case("limited", "train", ["inpython.toml", "--run-dir", "limited", *sets(task__timeout=60)]),
        Case("defense", "train", ["guard.toml", "--run-dir", "defense", *sets(task__classifier="inpython:redder")]),
        Case("defense-program", "train", ["guard.toml", "--run-dir", "defense-program", *sets(**redder)]),
        Case("simulate", "simulate", ["sol.toml", "-o", "ring.h5", *sets(task__simulator="inpython:step")]),
        Case("sol", "train", ["sol.toml", "--run-dir", "sol", *sets(data__root=str(work), task__simulator="inpython:step")]),
        Case("sol-program", "train", ["sol.toml", "--run-dir", "sol-program", *sets(data__root=str(work)), *one]),
    ]
    results = batch(2, work, cases, timeout=60)
    (work / "outage").unlink()
    return results


@pytest.fixture(scope="module")
def one(work, two):
    """Results of runs on one rank, after those on two."""
    (work / "slow").touch()
    (work / "calls.0").unlink()
    results = batch(1, work, [Case("hangs", "train", program("hangs", work, task__timeout=3))], timeout=60)
    (work / "slow").unlink()
    solver = [MPIRUN, "-n", "2", sys.executable, "{folder}/sum.py", "{theta}"]
    parallel = sets(task__command=solver, task__template="sum.py", task__pattern=r"sum (\S+) 2$",
                    stop__steps=1)  # fmt: skip
    parallel += ["--set", "task.initial={theta = 2.0}"]
    cases = [Case("parallel", "train", ["program.toml", "--run-dir", "parallel", *parallel])]
    cases += [Case("whole", "train", program("whole", work, task__concurrency=3))]
    cases += [Case(f"{name}-again", "train", program(name, work)) for name in ("down", "hangs")]
    return results | batch(1, work, cases, timeout=60)


def test_a_program_gives_the_bits_of_the_same_loss_in_python(work, two, one):
    two["python"].succeeded()
    one["whole"].succeeded()
    assert_same(bits(work / "python", but=("config",)), bits(work / "whole", but=("config",)))
    assert column(work / "whole", "train/queries") == [4, 9, 14, 19, 24, 29]


def test_a_program_that_fails_on_one_rank_ends_the_run_and_its_files_are_kept(work, two, one):
    line = two["down"].error(
        6, f"rank 1: task.command = {sys.executable}: left with exit code 7; its last words: no license left"
    )
    assert " (its files are kept in down/failed-rank1); the same command continues from down/checkpoints/step-" in line
    kept = work / "down" / "failed-rank1"
    assert (kept / "stderr.txt").read_text() == "no license left\n"
    assert len(json.loads((kept / "theta.json").read_text())["theta"]) == 3
    assert "restarting at step " in one["down-again"].succeeded().out
    assert_same(bits(work / "whole", but=("config",)), bits(work / "down", but=("config",)))


def test_a_program_that_hangs_is_killed_and_the_run_goes_on_later(work, two, one):
    one["hangs"].error(6, "had not ended after 3 s (task.timeout), and was killed", "the same command continues from")
    assert process.start_of(int((work / "hangs.0").read_text())) is None
    assert "restarting at step " in one["hangs-again"].succeeded().out
    assert_same(bits(work / "whole", but=("config",)), bits(work / "hangs", but=("config",)))


def test_a_program_may_be_an_mpi_job_itself(work, one):
    one["parallel"].succeeded()
    assert column(work / "parallel", "train/loss") == [6.0]


def test_a_function_with_a_time_limit_gives_the_bits_of_one_without(work, two):
    two["limited"].succeeded()
    assert_same(bits(work / "python", but=("config",)), bits(work / "limited", but=("config",)))


@pytest.mark.parametrize(("inside", "outside"), [("defense", "defense-program"), ("sol", "sol-program")])
def test_classifiers_and_solvers_may_be_programs(work, two, inside, outside):
    for name in ("simulate", inside, outside):
        two[name].succeeded()
    assert_same(bits(work / inside, but=("config",)), bits(work / outside, but=("config",)))


def test_a_job_that_is_killed_in_the_middle_of_calls_leaves_nothing_and_goes_on(work, two, one):
    (work / "slow").touch()
    for rank in (0, 1):
        (work / f"calls.{rank}").unlink(missing_ok=True)
        (work / f"hangs.{rank}").unlink(missing_ok=True)
    pids = []

    def kill(mpirun) -> None:
        until(lambda: list(work.glob("hangs.*")), "no call", 100)
        until(lambda: all(file.read_text() for file in work.glob("hangs.*")), "no call", 5)
        pids.extend(int(file.read_text()) for file in work.glob("hangs.*"))
        assert all(process.start_of(pid) for pid in pids) and len(list((work / "scratch").iterdir())) >= 2
        mpirun.send_signal(signal.SIGKILL)

    words = [MPIRUN, "-n", 2, sys.executable, "-m", "dzhpc.train", *program("killed", work)]
    run(words, work, meanwhile=kill)
    until(lambda: not any(process.start_of(pid) for pid in pids), "orphans", 20)
    (work / "slow").unlink()
    batch(1, work, [Case("killed", "train", program("killed", work))])["killed"].succeeded()
    assert_same(bits(work / "whole", but=("config",)), bits(work / "killed", but=("config",)))


def test_no_scratch_is_left(work, two, one):
    """But what the tests' own idle ranks may still use: those of ranks that have ended are gone."""
    until(lambda: not [f for f in (work / "scratch").iterdir() if gone(f)], "scratch", 20)


def gone(folder: Path) -> bool:
    pid, started, _ = folder.name.rsplit("-", 3)[1:]
    return process.start_of(int(pid)) != started


def until(condition, what: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)
