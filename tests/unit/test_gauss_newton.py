"""Gauss-Newton from the queries of CGE: responses of every engine, the step against autograd's, damping, the small system."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import dzhpc
from dzhpc.engines.blackbox import BlackBox
from dzhpc.engines.delta.losschange import LossChange
from dzhpc.errors import InputError
from dzhpc.tasks.defense.classifier import Answers, ClassifierLoss

MU = 1e-5


def net():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(64, 5)
    ).double()  # fmt: skip


def batch(loss="cross_entropy"):
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(6, 2, 6, 6, generator=draw, dtype=torch.float64)
    if loss == "mse":
        return inputs, torch.randn(6, 5, generator=draw, dtype=torch.float64)
    return inputs, torch.randint(0, 5, (6,), generator=draw)


def jacobian(model, inputs, coords):
    """Autograd's [n, B, K], running statistics left alone."""
    names, values = zip(*model.named_parameters(), strict=True)
    buffers = {k: b.clone() for k, b in model.named_buffers()}
    run = lambda *p: torch.func.functional_call(model, {**dict(zip(names, p, strict=True)), **buffers}, (inputs,))  # noqa: E731
    pieces = torch.autograd.functional.jacobian(run, values)
    return torch.cat([j.flatten(2) for j in pieces], 2).movedim(2, 0)[coords]


@pytest.mark.parametrize("kind", ["full", "reuse", "delta"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_responses_are_jacobian_columns_and_differences_their_reduction(kind, loss):
    model, (inputs, targets) = net(), batch(loss)
    engine = dzhpc.make_engine(kind, model, loss)
    base = engine.bind(inputs, targets)
    coords, asked = np.arange(0, engine.index.size, 7), engine.queries
    errors = []
    for mu in (1e-3, 1e-4):
        found = engine.responses(coords, mu) / mu
        assert found.shape == (len(coords), 6, 5)
        errors.append(float((found - jacobian(model, inputs, coords)).abs().max()))
    assert engine.queries - asked == 2 * len(coords)
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    change = LossChange(engine.loss, torch.float64, getattr(engine, "_kernels", None) or Plain())
    change.bind(model.train()(inputs).detach(), targets)
    reduced = change(engine.responses(coords, 1e-3), len(coords), torch.tensor(base))
    torch.testing.assert_close(reduced, engine.differences(coords, 1e-3), rtol=1e-9, atol=1e-12)


class Plain:
    """No compiled kernels."""

    @staticmethod
    def call(function, *arguments):
        return function(*arguments)


def test_slopes_and_roots_are_those_of_the_loss():
    logits = torch.randn(4, 5, dtype=torch.float64)
    for loss, targets in (("cross_entropy", torch.tensor([0, 4, 2, 2])), ("mse", torch.randn(4, 5, dtype=torch.float64))):
        engine = dzhpc.make_engine("full", lambda x: x + shift, loss, parameters={"shift": (shift := torch.zeros_like(logits))})
        engine.bind(logits, targets)
        value = lambda z, loss=engine.loss, targets=targets: loss(z, targets)  # noqa: E731
        gradient = torch.autograd.functional.jacobian(value, logits).flatten()
        hessian = torch.autograd.functional.hessian(value, logits).reshape(20, 20)
        unit, curvature = torch.eye(20, dtype=torch.float64).view(20, 4, 5), engine.curvature
        roots = curvature.roots(unit)
        torch.testing.assert_close(curvature.slopes(unit), gradient)
        torch.testing.assert_close(roots @ roots.T, hessian, atol=1e-12, rtol=1e-9)
        assert roots.shape[1] == curvature.size


def test_delta_keeps_digits_that_subtraction_loses():
    model, (inputs, targets) = net().float(), batch()
    exact, coords = copy.deepcopy(model).double(), np.arange(0, 100, 9)
    truth = jacobian(exact, inputs, coords)
    errors = {}
    for kind in ("full", "delta"):
        engine = dzhpc.make_engine(kind, model, "cross_entropy")
        engine.bind(inputs.float(), targets)
        errors[kind] = float((engine.responses(coords, MU) / MU - truth).norm() / truth.norm())
    assert errors["delta"] < 3e-5 < 1e-3 < errors["full"]


@pytest.mark.parametrize("kind", ["full", "reuse", "delta"])
@pytest.mark.parametrize("logits", [True, False])
def test_a_black_box_gives_answers_and_is_not_asked_more(kind, logits):
    torch.manual_seed(0)
    judge = nn.Sequential(nn.Flatten(), nn.Linear(2 * 36, 3)).double()
    ask = lambda x: judge(x) if logits else judge(x).softmax(1)  # noqa: E731
    box, answers = BlackBox(ask), Answers()
    denoiser = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Sigmoid()).double()
    inputs, targets = batch()[0], torch.rand(6, 3, dtype=torch.float64).softmax(1)
    engine = dzhpc.make_engine(kind, denoiser, ClassifierLoss(box, answers))
    engine.bind(inputs, targets)
    coords, asked = np.arange(9), box.queries
    found = engine.responses(coords, 1e-6)
    assert box.queries - asked == 6 * 9 and found.shape == (9, 6, 3)
    z = lambda: ask(denoiser(inputs))  # noqa: E731
    pieces = [torch.autograd.grad(z()[i, k], denoiser[0].weight)[0].flatten()[:9] for i in range(6) for k in range(3)]
    torch.testing.assert_close(found / 1e-6, torch.stack(pieces, 1).view(9, 6, 3), rtol=1e-3, atol=1e-6)
    loss = -(targets * (z().log_softmax(1) if logits else z().log())).sum(1).mean()
    gradient = torch.autograd.grad(loss, denoiser[0].weight)[0].flatten()[:9]
    torch.testing.assert_close(engine.curvature.slopes(found) / 1e-6, gradient, rtol=1e-3, atol=1e-7)


def test_a_loss_that_is_one_number_is_refused():
    engine = dzhpc.make_engine("full", net(), lambda outputs, targets: outputs.sum())
    engine.bind(*batch())
    with pytest.raises(InputError, match="gauss-newton"):
        _ = engine.curvature
