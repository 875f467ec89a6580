"""Pattern search: it lowers the bound loss whenever it moves, halves its radius after whole polls alone, and counts its moves."""

import numpy as np
import pytest
import torch
from nets import Quadratic, images

import dzhpc
from dzhpc.config import Zo
from dzhpc.method.coordinates import ParameterIndex
from dzhpc.method.estimators import make_estimator
from dzhpc.models.cnn import SimpleCNN


def search(engine, **keys):
    estimator = make_estimator(Zo(estimator="pattern", **keys), 0)
    estimator.begin(engine)
    return estimator


def step(engine, estimator):
    """One polled block: (the move on it, its differences [n, 2])."""
    coords = estimator.coordinates()
    pieces = [range(1), range(1, len(coords))] if len(coords) > 1 else [range(1)]
    values = torch.cat([estimator.evaluate(engine, coords, 0, piece) for piece in pieces])
    move = estimator.combine(engine, coords, 0, values)
    with torch.no_grad():
        for k in move.nonzero().flatten().tolist():
            engine.index.element(int(coords[k]))[1].add_(move[k])
    estimator.advance(move)
    return move, values


@pytest.mark.parametrize("kind", ["full", "delta"])
def test_a_move_lowers_the_loss_of_its_batch_by_the_difference_that_chose_it(kind):
    torch.manual_seed(0)
    model = SimpleCNN(2, 4).train()
    engine = dzhpc.make_engine(kind, model, "cross_entropy")
    batch = images(8, 12)
    base, estimator, moves = engine.bind(*batch), search(engine, mu=0.25, q=80), 0
    for _ in range(20):
        before = [p.clone() for p in model.parameters()]
        move, values = step(engine, estimator)
        now = engine.bind(*batch)
        if not move.any():
            assert now == base and all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            continue
        moves, taken = moves + 1, float(values.min())
        assert now < base and taken < 0
        if kind == "full":
            assert float(torch.tensor(now - base, dtype=torch.float64).float()) == taken
        else:
            assert now - base == pytest.approx(taken, abs=1e-6 * base)
        base = now
    assert moves > 5


class Function:
    """An engine over a function of theta [d] in float64."""

    def __init__(self, theta, function):
        self.theta = torch.nn.Parameter(torch.as_tensor(theta, dtype=torch.float64))
        self.index, self.function = ParameterIndex({"theta": self.theta}), function

    def differences(self, coords, mu):
        theta, found = self.theta.detach(), []
        for j in coords:
            at = theta.clone()
            at[int(j)] += mu
            found.append(self.function(at) - self.function(theta))
        return torch.stack(found)


def test_a_convex_quadratic_is_solved_to_half_the_radius_before_that_is_halved():
    torch.manual_seed(1)
    target, weights = 4 * torch.rand(7).double() - 2, torch.rand(7).double() + 0.1
    engine = Function(torch.zeros(7), lambda theta: (weights * (theta - target) ** 2).sum())
    estimator, radius, halved = search(engine, mu=1.0, q=4), 1.0, 0
    for _ in range(400):
        before = engine.theta.detach().clone()
        move, _ = step(engine, estimator)
        if estimator.radius < radius:
            assert not move.any() and torch.equal(before, engine.theta)
            assert float((engine.theta.detach() - target).abs().max()) <= radius / 2
            radius, halved = estimator.radius, halved + 1
    assert halved >= 6 and estimator.radius == 2.0**-halved


def test_a_poll_is_every_move_once_and_only_a_whole_failed_one_halves_the_radius():
    engine = Function(torch.arange(7.0), lambda theta: torch.zeros((), dtype=torch.float64))
    estimator = search(engine, mu=0.5, q=4)
    for poll in range(3):
        seen = []
        for block in range(4):
            assert (estimator.poll, estimator.block, estimator.radius) == (poll, block, 0.5**poll * 0.5)
            seen.append(estimator.coordinates())
            assert not step(engine, estimator)[0].any()
        assert sorted(np.concatenate(seen)) == list(range(7)) and [len(s) for s in seen] == [2, 2, 2, 1]
        assert all((np.diff(s) > 0).all() for s in seen)
    assert torch.equal(engine.theta.detach(), torch.arange(7.0).double())
    again = search(engine, mu=0.5, q=4)
    again.restore(estimator.state())
    assert (again.radius, again.poll, again.block) == (estimator.radius, 3, 0)
    assert np.array_equal(again.coordinates(), estimator.coordinates())


def test_of_equal_losses_the_lowest_position_counts_and_a_nan_never():
    engine = Function(torch.zeros(5), lambda theta: -theta.abs().max())
    estimator = search(engine, mu=1.0)
    assert step(engine, estimator)[0].tolist() == [1, 0, 0, 0, 0]
    engine = Function(torch.zeros(3), lambda theta: theta.sum() if theta[0] == 0 else theta.sum() * torch.nan)
    estimator = search(engine, mu=1.0)
    assert step(engine, estimator)[0].tolist() == [0, -1, 0]


def test_a_quadratic_network_of_the_other_tests_is_polled_whole():
    model = Quadratic(6)
    engine = dzhpc.make_engine("full", model, lambda out, _: out)
    first = engine.bind(model.h, None)
    estimator = search(engine, mu=0.5)
    assert len(estimator.coordinates()) == 6 and estimator.perturbations(6) == 12
    step(engine, estimator)
    assert engine.bind(model.h, None) < first
