"""The look at the first estimate: what it sees of rounding, curvature, noise, the exact gradient, and what it advises."""

import numpy as np
import pytest
import torch
from torch import nn

from dzhpc import config, make_engine
from dzhpc.errors import InputError
from dzhpc.method.estimators import make_estimator
from dzhpc.tasks.objective import Blocks, ObjectiveEngine
from dzhpc.training.first_look import look, signal


def said(function, mu, theta0=(0.5, 0.5, 0.5), lr=1e-3, momentum=0.0, nesterov=False, **zo):
    optim = {"lr": lr, "momentum": momentum, "nesterov": nesterov}
    table = {"zo": {"mu": mu, **zo}, "optim": optim, "sparsity": {"ratio": 0.0}}
    settings = config.parse(table, "x")
    engine = ObjectiveEngine(function, Blocks(np.array(theta0)), True, 100, 0, "loss")
    loss, coords = engine.bind(0), np.arange(len(theta0))
    estimator = make_estimator(settings.zo, 0)
    estimate = estimator.combine(engine, coords, 0, estimator.evaluate(engine, coords, 0, range(len(coords))))
    return look(engine, estimator, coords, loss, estimate, settings)


def bowl(thetas, step):
    return ((thetas + 0.1 * np.arange(3)) ** 2).sum(1) + 1


def test_nothing_is_advised_where_all_is_well():
    line = said(bowl, 1e-4)
    assert line.startswith("first estimate: differences of ") and line.endswith("of the slope") and ";" not in line
    assert "noise 0 and curvature 8.3e-05 of" in line  # mu H / 2 g = 3e-4 / 3.6, over all three


@pytest.mark.parametrize(
    ("function", "mu", "options", "advice"),
    [
        (bowl, 1e-15, {}, "raise zo.mu to "),
        (lambda thetas, step: bowl(thetas, step).astype(np.float32), 1e-6, {}, "units in the last place"),
        (lambda thetas, step: np.cosh(9 * thetas).sum(1), 0.2, {}, "lower zo.mu to "),
        (bowl, 1e-4, {"lr": 3.0}, r"lower optim.lr below 1: 2 \(1 \+ momentum\) / second derivative"),
        (bowl, 1e-4, {"lr": 0.8, "momentum": 0.5, "nesterov": True}, " 0.75: 2 (1 + momentum) / second derivative / (1 + 2 mo"),
        (lambda thetas, step: np.ones(len(thetas)), 1e-4, {}, "raise zo.mu (now 0.0001), or see that the loss depends on theta"),
        (lambda thetas, step: bowl(thetas, step) + np.random.default_rng().normal(size=len(thetas)), 1e-3, {}, "is noisy"),
    ],
    ids=["rounding", "single", "curved", "lr", "nesterov", "flat", "noisy"],
)
def test_what_is_off_is_named(function, mu, options, advice):
    with pytest.MonkeyPatch.context():
        line = said(function, mu, **options)
    assert advice.replace("\\", "") in line, line


def test_a_loss_beyond_float32_is_looked_at_without_a_word_of_numpys():
    with np.errstate(all="raise"):
        assert said(lambda thetas, step: 1e300 * bowl(thetas, step), 1e-4).startswith("first estimate: differences of ")


def test_heavy_balls_may_be_longer_than_nesterovs():
    assert "lower optim.lr" not in said(bowl, 1e-4, lr=0.8, momentum=0.5)


def test_the_advice_for_rounding_cures_it():
    single = lambda thetas, step: bowl(thetas, step).astype(np.float32)  # noqa: E731
    line = said(single, 1e-6)
    mu = float(line.split("raise zo.mu to ")[1].split(":")[0])
    assert ";" not in said(single, mu)


def test_a_white_box_is_compared_with_autograd():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    for engine in (make_engine(name, net, "cross_entropy") for name in ("full", "delta")):
        settings = config.parse({"zo": {"mu": 1e-3}, "optim": {"lr": 1e-3}}, "x")
        estimator, coords = make_estimator(settings.zo, 0), np.arange(engine.index.size)
        loss = engine.bind(x, y)
        estimate = estimator.evaluate(engine, coords, 0, range(len(coords)))
        line = look(engine, estimator, coords, loss, estimate, settings)
        assert "cosine to the exact gradient 1.000" in line and ("units" in line) == (type(engine).__name__ == "Full")
        assert "this is not the gradient" in look(engine, estimator, coords, loss, estimate.flip(0), settings)


def test_a_signal_is_counted_in_the_losses_own_unit():
    assert signal(np.array([2.0**-40, 2.0**-41, 2.0**-42]), 1.0, 1.0, torch.float64) == 2.0**11
    assert signal(np.array([2.0**-20, 2.0**-21, 2.0**-22]), 1.0, 1.0, torch.float64) == 2.0**2


class Outside(nn.Module):
    """Leaves torch on the way, so that autograd knows no gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.from_numpy(np.tanh(self.a(x).detach().numpy()))).detach()


def test_a_network_that_autograd_cannot_differentiate_is_trained_all_the_same():
    torch.manual_seed(0)
    engine = make_engine("full", Outside().double(), "cross_entropy")
    engine.bind(torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3)
    settings, coords = config.load(None, ["zo.mu=1e-4"]), np.arange(engine.index.size)
    estimator = make_estimator(settings.zo, 0)
    estimate = engine.differences(coords, 1e-4) / 1e-4
    assert "of the slope, autograd knows no gradient" in look(engine, estimator, coords, engine.base, estimate, settings)
    for ask in (engine.gradient, engine.hessian_gradient):
        with pytest.raises(InputError, match=r"autograd finds no gradient of Outside .*does not require grad.*estimator cge"):
            ask()
