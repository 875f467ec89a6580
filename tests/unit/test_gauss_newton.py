"""Gauss-Newton from the queries of CGE: responses of every engine, the step against autograd's, damping, the small system."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import dzhpc
from dzhpc import config
from dzhpc.engines.blackbox import BlackBox
from dzhpc.engines.delta.differences import cross_entropy_difference, mse_difference
from dzhpc.errors import InputError, NumericalError
from dzhpc.files.runfolder import RunFolder
from dzhpc.job.world import World
from dzhpc.method import gauss_newton as method
from dzhpc.method.optimizers import GaussNewton
from dzhpc.tasks import make_task
from dzhpc.tasks.defense.classifier import Answers, ClassifierLoss
from dzhpc.tasks.objective import Blocks, ObjectiveEngine
from dzhpc.training import columns
from dzhpc.training.trainer import Trainer

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
    engine.bind(inputs, targets)
    coords, asked = np.arange(0, engine.index.size, 7), engine.queries
    errors = []
    for mu in (1e-3, 1e-4):
        found = engine.responses(coords, mu) / mu
        assert found.shape == (len(coords), 6, 5)
        errors.append(float((found - jacobian(model, inputs, coords)).abs().max()))
    assert engine.queries - asked == 2 * len(coords)
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    outputs, changes = model.train()(inputs).detach(), engine.responses(coords, 1e-3)
    if loss == "mse":
        reduced = mse_difference(outputs - targets, changes)
    else:
        reduced = cross_entropy_difference(outputs.log_softmax(1), changes, targets)
    torch.testing.assert_close(reduced, engine.differences(coords, 1e-3), rtol=1e-9, atol=1e-12)


def test_slopes_and_roots_are_those_of_the_loss():
    logits = torch.randn(4, 5, dtype=torch.float64)
    labels, weights, wanted = torch.tensor([0, 4, 2, 2]), 3 * torch.rand(4, 5).double(), torch.randn(4, 5, dtype=torch.float64)
    for loss, targets in (("cross_entropy", labels), ("cross_entropy", weights), ("mse", wanted)):
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


def system(engine, coords, mu, kind, sample=False, difference="forward"):
    found = method.columns(engine, coords, mu, difference).double()
    rows = found[:, 2:]
    if sample:
        return method.System(found[:, 0], found[:, 1], kind, rows=rows)
    hessian = sum(method.gram(rows[:, part]) for part in method.parts(rows.shape[1]))
    return method.System(found[:, 0], hessian.diagonal().clone(), kind, hessian)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_the_step_is_that_of_autograds_jacobian_to_the_order_of_mu(loss, difference):
    model, (inputs, targets) = net(), batch(loss)
    engine = dzhpc.make_engine("delta", model, loss)
    engine.bind(inputs, targets)
    coords = np.arange(0, engine.index.size, 11)
    j, z = jacobian(model, inputs, coords).flatten(1), model(inputs).detach()
    value = lambda z: engine.loss(z.view(6, 5), targets)  # noqa: E731
    r = torch.autograd.functional.jacobian(value, z.flatten())
    b = torch.autograd.functional.hessian(value, z.flatten())
    h, damping = j @ b @ j.T, 0.01
    exact = -torch.linalg.solve(h + damping * torch.diag(h.diagonal() + method.EPS * h.diagonal().mean()), j @ r)
    errors, mus = [], [1e-2, 1e-3, 1e-4]
    for mu in mus:
        found = system(engine, coords, mu, "marquardt", difference=difference).solve(damping)
        errors.append(float((found - exact).norm() / exact.norm()))
    order = np.polyfit(np.log(mus), np.log(errors), 1)[0]
    assert errors[-1] < 1e-3 and order == pytest.approx(1 if difference == "forward" else 2, abs=0.15)


class Lines:
    """Residuals A theta - b."""

    def __init__(self):
        draw = np.random.default_rng(5)
        self.a, self.b = draw.standard_normal((30, 6)), draw.standard_normal(30)

    def initial(self):
        return np.linspace(-1, 1, 6)

    def residuals(self, thetas, step):
        return thetas @ self.a.T - self.b


def test_one_undamped_step_solves_linear_least_squares():
    lines, start = Lines(), torch.linspace(-1, 1, 6, dtype=torch.float64)
    engine = ObjectiveEngine(lines, Blocks(start.numpy()), True, 4, 0, "lines")
    base = engine.bind(0)
    assert base == pytest.approx(np.mean(lines.residuals(start.numpy()[None], 0) ** 2))
    solution = np.linalg.lstsq(lines.a, lines.b, rcond=None)[0]
    for sample in (False, True):
        step = system(engine, np.arange(6), 1e-3, "absolute", sample).solve(0.0)
        np.testing.assert_allclose(start + step, solution, rtol=1e-8)
    few = ObjectiveEngine(lines, Blocks(start.numpy()), True, 4, 0, "lines")
    few.bind(0)
    torch.testing.assert_close(
        few.differences(range(6), 1e-3) / 1e-3, 2 / 30 * torch.from_numpy(lines.a.T @ (lines.a @ start.numpy() - lines.b)),
        atol=1e-2, rtol=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["absolute", "relative", "marquardt"])
def test_sample_space_and_coordinates_give_one_step_and_the_trust_region_bounds_it(kind):
    engine = dzhpc.make_engine("delta", net(), "cross_entropy")
    engine.bind(*batch())
    coords = np.arange(0, engine.index.size, 3)
    of_coordinates, of_samples = (system(engine, coords, 1e-4, kind, sample) for sample in (False, True))
    delta = of_coordinates.solve(1e-3)
    torch.testing.assert_close(of_samples.solve(1e-3), delta, rtol=1e-6, atol=1e-9)
    assert len(coords) > engine.curvature.size  # H is singular, and no damping gives the step of least norm
    torch.testing.assert_close(of_samples.solve(0.0), of_coordinates.solve(0.0), rtol=1e-4, atol=1e-6)
    for trust in (0.3, 0.01):
        bounded = of_coordinates.within(1e-3, trust)
        assert 0.2 * trust < of_coordinates.change(bounded) <= trust * (1 + 1e-9) < of_coordinates.change(delta)
        assert of_samples.change(bounded) == pytest.approx(of_coordinates.change(bounded))
        assert bounded @ of_coordinates.gradient < 0


def test_a_sketch_is_right_in_the_mean_and_for_each_row_alone():
    rows = torch.randn(7, 1000, dtype=torch.float64)
    truth, seeds = rows @ rows.T, range(300)
    found = [method.Sketch(1000, 90, 1, k)(rows) for k in seeds]
    mean = torch.stack([s @ s.T for s in found]).mean(0)
    assert float((mean - truth).norm() / truth.norm()) < 0.03
    assert torch.equal(found[0][2:3], method.Sketch(1000, 90, 1, 0)(rows[2:3])) and not torch.equal(found[0], found[1])


def test_what_the_optimiser_would_do_is_what_it_does():
    section = config.Optim(name="gauss-newton", lr=0.3, momentum=0.8, weight_decay=0.1, nesterov=True)
    parameter = nn.Parameter(torch.linspace(-1, 1, 5))
    optimizer = GaussNewton(section, {"p": parameter})
    for _ in range(3):
        step, before = torch.randn(5), parameter.detach().clone()
        (move,) = optimizer.move([step])
        parameter.grad = -step
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), before + move)
    before = parameter.detach().clone()
    optimizer.rest()  # no step was found that lowers the loss: weight decay might raise it
    parameter.grad = torch.zeros(5)
    optimizer.step()
    assert torch.equal(parameter.detach(), before) and optimizer.move([step])[0].any()


def test_damping_follows_from_how_right_the_prediction_was():
    assert [method.next_damping(9.0, change, -1.0) for change in (-0.9, -0.5, -0.1, 0.0, np.nan)] == [1, 9, 18, 36, 36]


def test_the_prediction_is_that_of_the_step_that_is_tried_momentum_and_decay_included(tmp_path, monkeypatch):
    """Of a quadratic it is exact."""
    keys = ["task.kind=objective", f"task.function={__name__}:Lines", "optim.name=gauss-newton", "optim.adapt=true"]
    keys += ["optim.lr=0.3", "optim.momentum=0.7", "optim.weight_decay=0.05", "optim.warmup_epochs=0", "optim.damping=20"]
    tried, next_damping = [], method.next_damping
    monkeypatch.setattr(method, "next_damping", lambda *found: (tried.append(found[1:]), next_damping(*found))[1])
    folder = RunFolder(tmp_path / "run")
    folder.create()
    task = make_task(config.load(None, [*keys, "sparsity.ratio=0", "stop.steps=8"]), torch.device("cpu"))
    Trainer(World(), task, folder, quiet=True).run()
    changes, predicted = np.array(tried).T
    assert len(tried) >= 8 and (changes < 0).sum() >= 6
    np.testing.assert_allclose(predicted, changes, rtol=1e-6)


def test_a_step_of_which_nothing_was_predicted_tells_nothing_and_an_infinite_matrix_is_said():
    assert [method.next_damping(9.0, change, 0.0) for change in (-0.9, 0.9)] == [18, 36]
    one = torch.ones(2, dtype=torch.float64)
    for damping in (0.0, 0.1):
        with pytest.raises(NumericalError, match="not finite"):
            method.System(one, one, "absolute", torch.full((2, 2), torch.inf, dtype=torch.float64)).solve(damping)


@pytest.mark.parametrize("kind", ["absolute", "relative", "marquardt"])
def test_coordinates_that_change_nothing_stay_and_equal_ones_share_the_step(kind):
    a = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)  # the second is dead, the others are one
    h, g = a @ a.T, a @ torch.tensor([3.0, -1.0], dtype=torch.float64)
    for system in (method.System(g, h.diagonal(), kind, h), method.System(g, h.diagonal(), kind, rows=a)):
        for damping in (0.0, 1e-9):
            delta = system.solve(damping)
            torch.testing.assert_close(delta, -g / 10, rtol=1e-6, atol=1e-12)
    nothing = torch.zeros(3, dtype=torch.float64)
    assert not method.System(nothing, nothing, kind, torch.zeros(3, 3, dtype=torch.float64)).within(0.1, 0.1).any()


def test_columns_reach_the_root_in_pieces_of_a_bounded_size(monkeypatch):
    assert columns.slices(10, 2**26) == [slice(0, 4), slice(4, 8), slice(8, 10)] and columns.slices(2, 2**40)[1] == slice(1, 2)
    monkeypatch.setattr(columns, "AT_ONCE", 64)
    values, places = np.random.default_rng(0).standard_normal((5, 2 + 9)), np.array([4, 0, 3, 1, 2])
    found = columns.Columns([(places[:2], values[:2]), (places[2:], values[2:])], np.zeros((5, 2)), np.zeros(5, int))
    expected = torch.from_numpy(values[np.argsort(places), 2:])
    assert torch.equal(found.whole(World(alone=True)), expected)
    assert torch.equal(found.part(World(alone=True), [slice(3, 7)]), expected[:, 3:7])
    assert columns.Columns([], np.zeros((5, 2)), np.full(5, -1)).whole(World(alone=True)).shape == (5, 0)


def test_averages_begin_anew_with_a_new_set():
    keep, first, second = {"hessian": 0.8, "gradient": 0.5}, np.array([1, 4]), np.array([1, 5])
    now = lambda k: {"hessian": torch.full((2, 2), float(k)), "gradient": torch.full((2,), float(k))}  # noqa: E731
    state = method.averaged({}, first, now(1), keep)
    state = method.averaged(state, first, now(2), keep)
    assert float(state["hessian"][0, 0]) == pytest.approx(1.2) and float(state["gradient"][0]) == 1.5
    assert float(method.averaged(state, second, now(7), keep)["hessian"][0, 0]) == 7
    gradients = {name: state[name] for name in ("gradient", "coordinates")}  # all that is kept where H is not averaged
    found = method.averaged(gradients, first, now(3), keep | {"hessian": 0.0})
    assert float(found["hessian"][0, 0]) == 3 and float(found["gradient"][0]) == 2.25
