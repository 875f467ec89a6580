"""Solver in the loop on several ranks, over stops, kills and restarts: same bits; verbs around it; what ends a run."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from input_texts import SOL, text
from mpi_launch import Case, assert_same, batch, bits, checkpoints, column, sets

import dzhpc
from dzhpc.tasks.sol import reference
from dzhpc.tasks.sol.projected import Projected
from dzhpc.tasks.sol.wake import Wake

USER = """
import time
from pathlib import Path

import numpy as np


def ring(states, parameters):
    if Path("slow").exists():
        time.sleep(0.04)
    return 0.9 * states + parameters[:, None, None] * np.roll(states, 1, -1)


def cliff(states, parameters):
    return np.where(abs(states) > 0.3, np.nan, states)
"""
INPUT = text(SOL, checkpoint={"every_steps": 1, "keep": 9})
FIRST_ORDER = sets(zo__estimator="autograd", sparsity__ratio=0.0)
RING = sets(task__simulator="looped:ring", data__name="ring", model__kernel=3)
SCORED = sets(sparsity__scores="zo-grasp", sparsity__q=3, zo__mu=1e-5)  # theta + mu g must not diverge
CONFIGS = {
    "cge": [],
    "rge": [*SCORED, *sets(zo__engine="full", zo__estimator="rge", zo__q=5, zo__difference="central")],
    "fo-sol": FIRST_ORDER,
    "ring": RING,
    "non": [*RING, *FIRST_ORDER, *sets(task__unroll=1)],
}
RESTARTED = ("cge", "fo-sol")  # after step 4 of 6


def references(place: Path) -> None:
    """wake.h5: a wake of 8 x 16 cells, too coarse to be physics; ring.h5: what looped.ring gives, with some noise."""
    draw, wake = np.random.default_rng(0), Wake(8)
    solver, splits = Projected(wake, torch.device("cpu")), {}
    for split, res in (("train", [2e5, 8e5]), ("valid", [4e5, 1e6]), ("test", [4e5])):
        states, res = wake.initial().repeat(len(res), 1, 1, 1), torch.tensor(res)
        frames = []
        for _ in range(8):
            states = solver(1.02 * states, res)
            frames.append(states.numpy())
        splits[split] = np.stack(frames, 1), res.numpy()
    about = {"staggered": True, "resolution": 8, "factor": 2, "radius": 10.0}
    reference.save(place / "wake.h5", splits, about)
    rings = {split: (draw.normal(size=(2, 8, 2, 10)), np.array([0.1, 0.2])) for split in splits}
    reference.save(place / "ring.h5", rings, {"staggered": False})


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sol")
    (folder / "looped.py").write_text(USER)
    (folder / "input.toml").write_text(INPUT)
    references(folder)
    return folder


@pytest.fixture(scope="module")
def runs(place):
    """Each on one rank, undisturbed; and on three ranks, some of them restarted. The results by (ranks, name)."""

    def case(name: str, folder: str, *more: str) -> Case:
        return Case(name, "train", ["input.toml", "--run-dir", f"{folder}/{name}", *CONFIGS[name], *more])

    cliff = sets(task__simulator="looped:cliff", data__name="ring")
    verbs = [
        Case("dry", "train", ["input.toml", "--dry-run"]),
        Case("dry-first-order", "train", ["input.toml", "--dry-run", *FIRST_ORDER]),
        Case("prune", "prune", ["input.toml", "-o", "lpr.h5", *SCORED]),
        Case("info", "info", ["wake.h5"]),
        Case("report", "report", ["1/cge", "1/fo-sol", "-o", "compared"]),
        Case("missing", "train", ["input.toml", *sets(data__name="nothing")]),
        Case("diverges", "train", ["input.toml", "--run-dir", "diverges", *cliff]),
    ]
    found = {(1, name): result for name, result in batch(1, place, [case(name, "1") for name in CONFIGS] + verbs).items()}
    first = [case(name, "3", *(["--set", "stop.steps=4"] if name in RESTARTED else [])) for name in CONFIGS if name != "ring"]
    rests = [Case(f"rest-{name}", "train", case(name, "3").args) for name in RESTARTED]
    return found | {(3, name): result for name, result in batch(3, place, first + rests).items()}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "ring"])
def test_bits_depend_neither_on_ranks_nor_on_restarts(place, runs, name):
    for key in ((1, name), (3, name), *([(3, f"rest-{name}")] if name in RESTARTED else [])):
        runs[key].succeeded()
    but = ("config", "metrics/eval")  # an evaluation at the end of the first half
    assert_same(bits(place / "1" / name, but), bits(place / "3" / name, but))
    assert column(place / "1" / name, "train/step") == [1, 2, 3, 4, 5, 6]
    errors = column(place / "1" / name, "eval/loss")
    assert column(place / "3" / name, "eval/loss")[-1] == errors[-1]
    assert errors[0] != errors[1]


def test_a_stop_and_a_kill_and_a_restart_leave_no_trace(place, runs):
    """By a signal in the middle of a step, and of the same run once more by SIGKILL; on two ranks, then on three."""
    args, folder = runs and ["input.toml", "--run-dir", "disturbed", *RING], place / "disturbed"

    def disturb(steps: int, number: int):
        def meanwhile(job) -> None:
            end = time.monotonic() + 60
            while len(checkpoints(folder)) < steps:
                assert time.monotonic() < end, "no checkpoint"
                time.sleep(0.01)
            os.kill(max(job.processes()), number)

        (place / "slow").touch()
        result = batch(2, place, [Case("disturbed", "train", args)], meanwhile=meanwhile)["disturbed"]
        (place / "slow").unlink()
        return result

    stopped = disturb(1, signal.SIGUSR1)
    assert stopped.code == 75, stopped.err
    reached = len(checkpoints(folder))
    killed = disturb(3, signal.SIGKILL)
    assert killed.code not in (0, 75)
    assert 0 < reached <= len(checkpoints(folder)) < 6
    for result in batch(3, place, [Case("disturbed", "train", args)]).values():
        result.succeeded()
    assert_same(bits(folder, ("config",)), bits(place / "1" / "ring", ("config",)))


def test_queries_are_states_that_the_simulator_advances(place, runs):
    """375 weights, half of them active, and 5 biases; unroll 3, batch 3; two evaluations of 2 simulations, 7 steps."""
    runs[1, "cge"].succeeded()
    active = 188 + 5
    queries = column(place / "1" / "cge", "train/queries")
    assert queries[0] == 3 * 3 + active * 3 * 2
    assert queries[5] == 6 * queries[0] + 2 * 7


def test_verbs_know_the_task(place, runs):
    dry = runs[1, "dry"].succeeded().out
    assert "coordinates 380, active |S| 193, steps 6 of 3 an epoch" in dry
    assert f"queries: {9 + 193 * 6:,} a step, 0 for scores, 28 for evaluations" in dry
    assert "queries: 9 a step" in runs[1, "dry-first-order"].succeeded().out
    table = runs[1, "prune"].succeeded().out
    assert all(f"| layers.{k}.weight | {size} |" in table for k, size in ((0, 225), (2, 150)))
    about = runs[1, "info"].succeeded().out
    assert all(word in about for word in ("dzhpc-reference", "staggered", "train/states"))
    report = runs[1, "report"].succeeded().out
    assert "| cge | 6 | 2.00 |" in report
    assert "| fo-sol | 6 | 2.00 |" in report


def test_a_checkpoint_is_a_network(place, runs):
    runs[1, "cge"].succeeded()
    model = dzhpc.load_model(place / "1" / "cge")
    assert sum(p.numel() for p in model.parameters()) == 380
    assert model(torch.ones(1, 3, 8, 16)).abs().max() > 0


def test_a_missing_reference_names_the_command_that_makes_it(runs):
    runs[1, "missing"].error(2, "nothing.h5: no such file", "python -m dzhpc.simulate INPUT -o nothing.h5")


def test_a_solver_that_cannot_take_the_reference_ends_the_run_and_names_the_frame(runs):
    said = "task.simulator = looped:cliff makes NaN or infinity of this frame of the reference; the network has no part in that"
    runs[1, "diverges"].error(5, "simulation of parameter 0.", "frame", said)
