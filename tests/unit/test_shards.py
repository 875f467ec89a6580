"""Shards of a batch: the step is the mean of theirs, running statistics move in order, work is dealt out by cost."""

import copy
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dzhpc
from dzhpc import config as configuration
from dzhpc.engines.pinned import Pinned
from dzhpc.errors import InputError
from dzhpc.job.world import World
from dzhpc.method.coordinates import balance
from dzhpc.method.estimators import make_estimator
from dzhpc.tasks import make_task
from dzhpc.training.distribution import Distribution, Interrupted

CPU = torch.device("cpu")


def digits(*keys):
    table = configuration.load("inputs/digits.toml", ["model.width=4", "data.batch_size=24", "data.train_limit=96", *keys])
    return make_task(table, CPU)


def estimate(task, coords, partial=None, urgent=lambda: False):
    distribution, kind = Distribution(World(), task, urgent), make_estimator(task.config.zo, 0)
    with Pinned(task.model, CPU).unchanged():
        task.bind(0)  # as a launch does: chunks depend on a shard's shape
    distribution.assign(coords, kind, partial)
    return distribution.estimate(kind, 0, partial)


@pytest.mark.parametrize("kind", ["cge", "autograd"])
def test_a_step_is_the_mean_over_its_shards(project, monkeypatch, kind):
    """Beside an engine of its own for each shard, and BatchNorms that have seen one shard after the other."""
    monkeypatch.chdir(project)
    task = digits("data.shards=3", "zo.engine=reuse", f"zo.estimator={kind}")
    start, coords = copy.deepcopy(task.model), np.arange(0, task.engine.index.size, 29)
    images, labels = task.batches.batch(0)
    losses, gradients, moved = [], [], copy.deepcopy(start)
    for s in range(3):
        engine = dzhpc.make_engine("full", copy.deepcopy(start).double().train(), "cross_entropy")
        losses.append(engine.bind(images[s::3].double(), labels[s::3]))
        exact = engine.index.flatten(engine.gradient())[torch.from_numpy(coords)]
        gradients.append(exact if kind == "autograd" else engine.differences(coords, task.config.zo.mu) / task.config.zo.mu)
        moved.train()(images[s::3])
    loss, found = estimate(task, coords)
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)
    truth = torch.stack(gradients).mean(0)
    assert (found - truth).norm() < 1e-3 * truth.norm()
    for (name, buffer), (_, after), (_, before) in zip(
        task.model.named_buffers(), moved.named_buffers(), start.named_buffers(), strict=True
    ):
        assert torch.allclose(buffer, after, rtol=1e-5, atol=1e-6), name
        assert not torch.equal(buffer, before)


def test_a_step_left_between_two_shards_is_completed_to_the_bit(project, monkeypatch):
    monkeypatch.chdir(project)
    keys, coords = ("data.shards=2", "zo.engine=reuse"), np.arange(0, 120, 3)
    whole = estimate(digits(*keys), coords)
    task = digits(*keys)
    asked = []
    with pytest.raises(Interrupted) as left:
        estimate(task, coords, urgent=lambda: bool(asked.append(1)) or len(asked) > 3)
    known = left.value.partial
    assert len(known.done) == 2 * len(coords) and 0 < known.done.sum() < len(coords)
    loss, values = estimate(task, coords, known)
    assert loss == whole[0] and torch.equal(values, whole[1])


def test_buffers_that_no_rule_joins_are_named(project, monkeypatch):
    monkeypatch.chdir(project)
    task = digits("data.shards=2", "zo.engine=full")
    task.model.register_buffer("seen", torch.zeros(()))
    task.model.register_forward_pre_hook(lambda model, inputs: model.seen.add_(inputs[0].mean()) and None)
    with pytest.raises(InputError, match=r"data.shards = 2: buffer seen moves at each pass; only a BatchNorm's may"):
        estimate(task, np.arange(2))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (["data.shards=5"], "data.shards = 5: data.batch_size = 128 is no multiple of it"),
        (["data.shards=0"], "data.shards"),
    ],
)
def test_shards_that_cannot_be(project, keys, line):
    with pytest.raises(InputError, match=line):
        configuration.load(project / "inputs/digits.toml", keys)


class Normed(torch.nn.Module):
    """A BatchNorm of one value an example."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Linear(64, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, classes)

    def forward(self, x):
        return self.last(self.norm(self.first(x.flatten(1))))


def test_one_example_in_a_shard_is_refused_where_batchnorm_needs_two(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setitem(sys.modules, "own_normed", types.SimpleNamespace(Normed=Normed))
    keys = ["model.name=own_normed:Normed", "data.name=digits", "data.batch_size=24", "sparsity.scores=random"]
    make_task(configuration.load(None, [*keys, "data.shards=12", "data.augment=false"]), CPU)
    with pytest.raises(InputError, match=r"data.shards = 24: leaves one example of data.batch_size = 24 in each part, which"):
        make_task(configuration.load(None, [*keys, "data.shards=24", "data.augment=false"]), CPU)
    assert digits("data.shards=24").bind(0, 23) > 0  # its BatchNorms see pixels


def test_a_task_without_a_batch_refuses(project, monkeypatch):
    monkeypatch.chdir(project / "examples")
    table = configuration.load("own_loss.toml", ["data.shards=2", "data.batch_size=2", "optim.name=adam", "optim.adapt=false"])
    with pytest.raises(InputError, match=r'data\.shards = 2: task\.kind = "objective" does not cut its batch'):
        make_task(table, CPU)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 6), st.integers(1, 40), st.floats(0, 50),
)  # fmt: skip
def test_dealt_work_is_complete_and_no_rank_bears_more_than_a_share_and_a_piece(costs, shards, ranks, base):
    pieces = [(s, c) for s in range(shards) for c in costs]
    slices = balance([c for _, c in pieces], ranks, [s for s, _ in pieces], base)
    assert sorted(k for part in slices for k in part) == list(range(len(pieces)))
    loads = [sum(pieces[k][1] for k in part) + base * len({pieces[k][0] for k in part}) for part in slices]
    assert max(loads) <= sum(loads) / ranks + max(costs) + base + 1e-6


def test_ranks_keep_to_few_shards():
    """Twelve ranks and four shards: three ranks a shard, so that none binds twice."""
    slices = balance([1.0] * 120, 12, [k // 30 for k in range(120)], 5.0)
    assert [len({k // 30 for k in part}) for part in slices] == [1] * 12
    assert {len(part) for part in slices} == {10}
