"""Estimators: errors of the known size and order, unbiased, and functions of (seed, index)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import Quadratic, tanh_net, vectors

import dzhpc
from dzhpc.config import Zo
from dzhpc.engines.losses import LOSSES
from dzhpc.method.estimators import direction, make_estimator, rge_slopes, rge_sum
from dzhpc.models.resnet import resnet20


def bound(model, batch, kind="reuse", loss="mse"):
    engine = dzhpc.make_engine(kind, model, loss)
    engine.bind(*batch)
    return engine


def flat(engine, gradient):
    return engine.index.flatten(gradient.values())


@pytest.mark.parametrize("kind", ["full", "reuse"])
@pytest.mark.parametrize("mu", [1e-1, 1e-3, -1e-2])
def test_on_a_quadratic_forward_differences_err_by_half_mu_times_the_curvature_and_central_ones_not_at_all(kind, mu):
    model = Quadratic(12)
    engine = dzhpc.make_engine(kind, model, lambda out, _: out)
    round_off = 1e-14 * abs(engine.bind(model.h, None)) / abs(mu) + 1e-13
    exact, coords = model.gradient(), range(12)
    assert torch.allclose(dzhpc.cge(engine, coords, mu) - exact, mu / 2 * model.h.diag(), rtol=0, atol=round_off)
    assert torch.allclose(dzhpc.cge(engine, coords, mu, "central"), exact, rtol=0, atol=round_off)
    assert float((mu / 2 * model.h.diag()).abs().min()) > 10 * round_off


@pytest.mark.parametrize(("difference", "order"), [("forward", 1), ("central", 2)])
def test_the_order_in_mu_on_a_smooth_network_is_1_for_forward_and_2_for_central_differences(difference, order):
    engine = bound(tanh_net(4, 6, 4), vectors())
    exact, coords = flat(engine, dzhpc.autograd(engine)), range(engine.index.size)
    mus = 2.0 ** -np.arange(3, 9)
    errors = [float((dzhpc.cge(engine, coords, mu, difference) - exact).norm()) for mu in mus]
    fitted = np.polyfit(np.log(mus), np.log(errors), 1)[0]
    assert abs(fitted - order) < 0.05


def test_autograd_equals_back_propagation_by_hand():
    model, (x, y) = tanh_net(4, 6, 4), vectors()
    F.mse_loss(model(x), y).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    gradient = dzhpc.autograd(bound(model, (x, y)))
    assert list(gradient) == list(expected)
    assert all(torch.allclose(gradient[name], expected[name], rtol=1e-13) for name in expected)


def test_the_cosine_of_cge_to_autograd_on_resnet20_is_at_least_0_999():
    model = resnet20().double()
    batch = torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.randint(0, 10, (16,))
    engine = bound(model, batch, loss="cross_entropy")
    coords = torch.randperm(engine.index.size)[:200]
    exact = flat(engine, dzhpc.autograd(engine))[coords]
    estimate = dzhpc.cge(engine, coords, 1e-3)
    assert F.cosine_similarity(exact, estimate, dim=0) >= 0.999
    assert abs(estimate.norm() / exact.norm() - 1) < 0.02


@pytest.mark.parametrize("difference", ["forward", "central"])
def test_the_mean_of_many_rge_samples_is_within_4_standard_errors_of_the_gradient(difference):
    engine, q = bound(tanh_net(4, 3, 4), vectors(), "full"), 4000
    coords = np.arange(engine.index.size)
    slopes = rge_slopes(engine, range(q), 1e-6, 5, coords, difference)
    samples = slopes[:, None] * torch.stack([direction(5, i, engine.index.size, engine.index) for i in range(q)])
    mean, error = samples.mean(0), samples.std(0) / q**0.5
    exact = flat(engine, dzhpc.autograd(engine))
    assert ((mean - exact).abs() < 4 * error).all()
    assert exact.norm() > 4 * error.norm()  # so zero would not pass
    assert torch.allclose(rge_sum(slopes, 5, coords, engine.index), mean, atol=1e-12)


def test_rge_gives_a_tensor_of_its_parameters_shape_by_name():
    engine = bound(tanh_net(4, 3, 4), vectors())
    estimate = dzhpc.rge(engine, 10, 1e-3, seed=1)
    assert {name: g.shape for name, g in estimate.items()} == {name: p.shape for name, p in engine.model.named_parameters()}
    coords = np.arange(engine.index.size)
    slopes = rge_slopes(engine, range(10), 1e-3, 1, coords)
    expected = sum(s * direction(1, i, len(coords), engine.index) for i, s in enumerate(slopes)) / 10
    assert torch.allclose(flat(engine, estimate), expected, rtol=1e-12)


def test_fzoo_is_rge_over_the_spread_of_its_slopes_whatever_the_scale_of_the_loss():
    found, model, batch = [], tanh_net(4, 3, 4), vectors()
    for scale in (1.0, 1e4):
        engine = bound(model, batch, "full", lambda out, y, scale=scale: scale * LOSSES["mse"](out, y))
        coords, estimator = np.arange(0, engine.index.size, 2), make_estimator(Zo(estimator="fzoo", q=6, mu=1e-4), 3)
        slopes = estimator.evaluate(engine, coords, 1, range(6))
        found.append(estimator.combine(engine, coords, 1, slopes))
        plain = make_estimator(Zo(estimator="rge", q=6), 3).combine(engine, coords, 1, slopes)
        torch.testing.assert_close(found[-1], plain / np.std(slopes.numpy(), ddof=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(*found, rtol=1e-8, atol=0)
    assert found[0].abs().min() > 0
    assert not estimator.combine(engine, coords, 1, torch.zeros(6, dtype=torch.float64)).any()


def test_rge_directions_are_functions_of_seed_and_index():
    engine = bound(tanh_net(4, 3, 4), vectors())
    coords = np.arange(engine.index.size)
    whole = rge_slopes(engine, range(9), 1e-3, 7, coords)
    for ranks in (2, 3, 10):
        joined = torch.empty_like(whole)
        for rank in range(ranks):
            torch.rand(rank)  # whatever a rank did before
            joined[rank::ranks] = rge_slopes(engine, range(rank, 9, ranks), 1e-3, 7, coords)
        assert torch.equal(joined, whole)
    assert not torch.equal(whole, rge_slopes(engine, range(9), 1e-3, 8, coords))
    assert len(set(whole.tolist())) == 9


def test_rge_directions_are_standard_normal():
    u = torch.stack([direction(0, i, 100, bound(tanh_net(4, 4), vectors()).index) for i in range(400)])
    assert abs(u.mean()) < 4 / 200
    assert abs(u.var() - 1) < 4 * (2 / 40_000) ** 0.5


def test_rge_on_a_coordinate_set_perturbs_nothing_else():
    engine = bound(tanh_net(4, 3, 4), vectors(), "full")
    coords = np.array([2, 11, 30])
    slopes = rge_slopes(engine, range(4), 1e-3, 0, coords)
    u = torch.zeros(4, engine.index.size, dtype=torch.float64)
    u[:, coords] = torch.stack([direction(0, i, 3, engine.index) for i in range(4)])
    assert torch.equal(slopes, engine.directional(u, 1e-3) / 1e-3)


def test_central_rge_errs_by_less_than_forward_rge():
    model = Quadratic(8)
    engine = bound(model, (model.h, None), "full", lambda out, _: out)
    u = torch.stack([direction(0, i, 8, engine.index) for i in range(5)])
    exact = u @ model.gradient()
    central, forward = (rge_slopes(engine, range(5), 0.1, 0, np.arange(8), kind) for kind in ("central", "forward"))
    assert torch.allclose(central, exact, rtol=0, atol=1e-11)
    assert torch.allclose(forward - exact, 0.05 * (u @ model.h * u).sum(1), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("name", "targets"), [("cross_entropy", torch.tensor([1, 0, 2])), ("mse", torch.randn(3, 4))])
def test_losses_of_float32_networks_are_summed_in_float64(name, targets):
    outputs = torch.randn(3, 4)
    value = LOSSES[name](outputs, targets)
    reference = getattr(F, {"mse": "mse_loss"}.get(name, name))
    assert value.dtype == torch.float64
    assert abs(value - reference(outputs, targets)) < 1e-6
