"""Queries that differ in time: ranks that are done take over what others have not begun, with the same bits."""

import numpy as np
import pytest
from mpi_launch import Case, assert_same, batch, bits, sets

RUN = [
    "objective.toml",
    *sets(task__function="userland:Iterates", task__batch_limit=1, zo__mu=1e-3, optim__lr=1e-3, stop__steps=3),
]
RUNS = {"own": RUN, "taken": [*RUN, *sets(run__take_over=True)]}
SCORED = sets(zo__estimator="rge", zo__q=9, sparsity__ratio=0.5, sparsity__q=7, stop__steps=2, task__function="userland:LongStep")


@pytest.fixture(scope="module")
def runs(place):
    """The place of runs on three ranks, and of the same on one."""
    cases = [Case(name, "train", [*args, "--run-dir", name], {"BOX": name}) for name, args in RUNS.items()]
    for name, result in batch(3, place, [*cases, Case("rge", "train", [*RUNS["taken"], *SCORED, "--run-dir", "rge"])]).items():
        assert result.succeeded(), name
    batch(1, place, [Case("rge-1", "train", [*RUNS["taken"], *SCORED, "--run-dir", "rge-1"])])["rge-1"].succeeded()
    return place


def idle(place, name: str) -> float:
    """The share of a step in which ranks have done all their calls and others have not, in the better of two steps."""
    shares = []
    for k in (1, 2):  # at step 0 the input was tried out before
        calls = [np.loadtxt(place / f"calls.{name}.{rank}") for rank in range(3)]
        calls = [rows[rows[:, 0] == k, 1:] for rows in calls]
        first, last = min(rows.min() for rows in calls), max(rows.max() for rows in calls)
        shares.append(np.mean([last - rows.max() for rows in calls]) / (last - first))
    return min(shares)


def test_ranks_that_are_done_take_over(runs):
    assert idle(runs, "own") > 0.4
    assert idle(runs, "taken") < 0.1


@pytest.mark.parametrize(("one", "other"), [("own", "taken"), ("rge-1", "rge")])
def test_bits_do_not_depend_on_who_evaluates(runs, one, other):
    assert_same(bits(runs / one, ("config",)), bits(runs / other, ("config",)))
