"""The model of a step: beside an event simulation of the actual slices, and by hand where that is possible."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dzhpc import config
from dzhpc.training.stepmodel import INFINIBAND, Network, Shard, StepModel, possible

RANDOM = np.random.default_rng(0)
CHUNKS = [range(k, min(k + 8, 3000)) for k in range(0, 3000, 8)]
EACH = np.sort(RANDOM.uniform(0.01, 0.1, 3000))[::-1]  # seconds: early layers cost more


def model(base_s=6.0, counts=(1, 2, 4, 8), network=INFINIBAND):
    return StepModel({n: Shard(n, base_s / n, CHUNKS, EACH / n) for n in counts}, 1000, 0.01, network, 4)


def test_one_rank_bears_all():
    step = model().step(1, 1)
    assert step.seconds == pytest.approx(6 + EACH.sum() + 0.01)
    assert model().step(1, 4).seconds == pytest.approx(step.seconds)  # four quarters of the base pass
    assert model().efficiency(step, model().best(1)) == 1


@pytest.mark.parametrize(("ranks", "count"), [(3, 1), (7, 4), (64, 2), (1024, 8), (4096, 8)])
def test_it_agrees_with_an_event_simulation(ranks, count):
    """What chunks really take is drawn around what they are expected to; the slices are those of a run."""
    expected = model().step(ranks, count)
    for _ in range(3):
        simulated = model().step(ranks, count, lambda s: s * RANDOM.lognormal(0, 0.04, len(s)))
        assert simulated.seconds == pytest.approx(expected.seconds, rel=0.15)


def test_shards_pay_where_the_base_pass_holds_back():
    plain, best = model().step(256, 1), model().best(256)
    assert plain.bottleneck == "base pass" and best.shards == 8
    assert plain.seconds > 6 and best.seconds < 0.4 * plain.seconds
    assert model().best(1).shards == 1
    one = model().best(1)
    assert model().efficiency(best, one) > 2 * model().efficiency(plain, one)


@pytest.mark.parametrize(("size", "norm", "numbers"), [(512, True, [1, 2, 4, 8, 16]), (48, True, [1]), (3, False, [1, 3])])
def test_shards_that_are_proposed_divide_the_batch_and_leave_a_batchnorm_enough(size, norm, numbers):
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3)).train(norm)
    task = SimpleNamespace(model=model, config=config.load(None, [f"data.batch_size={size}"]))
    assert possible(task) == numbers


def test_a_join_takes_latency_and_bandwidth():
    network = Network("", 1e-3, 1e6)
    assert network.join_s(1, 1e6) == 0
    assert network.join_s(8, 8e6) == pytest.approx(2 * (3e-3 + 7))
    step = model(network=network).step(8, 2)
    assert step.join_s == pytest.approx(network.join_s(8, 4 * 2 * 3000 + 8 * 2 * 1001))
