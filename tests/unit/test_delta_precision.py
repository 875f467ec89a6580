"""Engine delta in fp32 and bf16, with and without a compiler, against the float64 difference; which networks need no way out."""

import copy
import itertools
import logging

import numpy as np
import pytest
import torch
from delta_nets import VGG, DnCNN, Normed, TinyTransformer, relative
from torch import nn

import dzhpc
from dzhpc.engines.kernels import compiled as programs
from dzhpc.models.cnn import SimpleCNN
from dzhpc.models.resnet import resnet18, resnet20, resnet56
from dzhpc.models.vit import ViT

TOLERANCES = {"fp32": 1e-3, "bf16": 2e-2}


class Residual(nn.Module):
    """A stem and two residual blocks, the second with stride and projection."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.one, self.two = self.block(16, 16, 1), self.block(16, 32, 2)
        self.short, self.relu, self.fc = nn.Conv2d(16, 32, 1, 2, bias=False), nn.ReLU(), nn.Linear(32, 10)

    @staticmethod
    def block(a, b, stride):
        return nn.Sequential(
            *(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()),
            *(nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)),
        )

    def forward(self, x):
        x = self.stem(x)
        x = self.relu(x + self.one(x))
        return self.fc(self.relu(self.short(x) + self.two(x)).mean((2, 3)))


FAMILIES = {
    "cnn": lambda: SimpleCNN(2),
    "resnet": Residual,
    "vgg": VGG,
    "normed": Normed,
    "transformer": TinyTransformer,
    "vit": lambda: ViT(depth=1, width=24, heads=2, patch=8),
    "dncnn": DnCNN,
}


def problem(name, batch=16, per_parameter=4):
    """(model in fp32, loss, inputs, targets, coordinates of every parameter, their float64 differences by mu)."""
    torch.manual_seed(1)
    model, size = FAMILIES[name](), 32 if name == "vit" else 16
    for p in model.parameters():  # no parameter at a special value
        p.data += 0.05 * torch.randn_like(p)
    inputs = torch.randn(batch, 3, size, size)
    loss, targets = ("mse", inputs.tanh()) if name == "dncnn" else ("cross_entropy", torch.randint(0, 10, (batch,)))
    offsets, draw = np.cumsum([0] + [p.numel() for p in model.parameters()]), np.random.default_rng(0)
    coords = np.concatenate([draw.integers(a, b, per_parameter) for a, b in itertools.pairwise(offsets)])
    truth = dzhpc.make_engine("full", copy.deepcopy(model).double(), loss)
    truth.bind(inputs.double(), targets.double() if loss == "mse" else targets)
    return model, loss, inputs, targets, coords, {mu: truth.differences(coords, mu) for mu in (5e-3, 1e-4)}


def check(name, precision, caplog):
    """Errors against the float64 difference, both mu; the engine and what it said."""
    model, loss, inputs, targets, coords, expected = problem(name)
    with caplog.at_level(logging.INFO, logger="dzhpc"):
        logging.getLogger("dzhpc").propagate = True
        engine = dzhpc.make_engine("delta", model, loss, precision)
        engine.bind(inputs, targets)
        for mu, truth in expected.items():
            found, zero = engine.differences(coords, mu), truth.abs() < 1e-9 * truth.abs().max()
            assert relative(found[~zero], truth[~zero]) < TOLERANCES[precision]
            # a bias before a BatchNorm: nothing changes but roundings
            assert bool((found[zero].abs() < 2e-3 * truth.abs().max()).all())
    return engine


# each compiles for ten seconds or so: the others differ in rules, not in what a compiler does with them
@pytest.mark.parametrize(("name", "precision"), [("cnn", "fp32"), ("resnet", "bf16"), ("normed", "bf16")])
def test_close_to_float64_with_a_compiler(name, precision, caplog, monkeypatch):
    compiled, compile_one = [], programs.Programs.compile

    def counted(self, traced, tensors):
        compiled.append(programs.largest(traced))
        return compile_one(self, traced, tensors)

    monkeypatch.setattr(programs.Programs, "compile", counted)
    engine = check(name, precision, caplog)
    if not engine.compiling:
        pytest.skip("no compiler here")
    assert compiled
    assert min(compiled) > programs.SMALL
    assert not [line for line in caplog.messages if "not compiled" in line]


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", FAMILIES)
def test_close_to_float64_without_a_compiler_which_is_said_once(name, precision, caplog, monkeypatch):
    monkeypatch.setattr(programs, "COMPILERS", ())
    engine = check(name, precision, caplog)
    assert not engine.compiling
    assert sum("not compiled: no C++ compiler" in line for line in caplog.messages) == 1


NAMED = {
    **{f"cnn depth {depth}": (lambda depth=depth: SimpleCNN(depth)) for depth in range(1, 6)},
    "resnet20": resnet20,
    "resnet56": resnet56,
    "resnet18": resnet18,
    "vit-tiny": lambda: ViT(depth=2, width=48, heads=3),
    **{name: FAMILIES[name] for name in ("vgg", "transformer", "dncnn", "resnet")},
    "groupnorm": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8),
        nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    ),
}  # fmt: skip


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMED)
def test_named_networks_need_no_way_out(name, train, caplog):
    model = NAMED[name]().train(train)
    inputs = torch.randn(2, 3, 32, 32) if name in ("vit-tiny", "cnn depth 5") else torch.randn(2, 3, 16, 16)
    loss, targets = ("mse", inputs) if name == "dncnn" else ("cross_entropy", torch.randint(0, 10, (2,)))
    with caplog.at_level(logging.INFO, logger="dzhpc"):
        logging.getLogger("dzhpc").propagate = True
        engine = dzhpc.make_engine("delta", model, loss)
        engine.bind(inputs, targets)  # tries every rule and every seed
    assert not [line for line in caplog.messages if "no rule" in line or "one coordinate at a time" in line]
    assert [plan.refusal for plan in engine._plans] == [""] * len(engine.index.names)
    assert all(len(plan.nodes) > 1 for plan in engine._plans)
