"""Engine delta in fp32 and bf16, with and without a compiler, against the float64 difference; which networks need no way out.

bf16 only where the processor has its products: emulated ones take minutes. How changes travel in a narrower type than the
parameters is tested on all processors, by float32 below float64.
"""

import copy
import dataclasses
import itertools
import logging

import numpy as np
import pytest
import torch
from delta_nets import VGG, DnCNN, Normed, TinyTransformer, relative
from torch import nn

import dzhpc
from dzhpc.engines.delta import differences
from dzhpc.engines.delta.change import Change
from dzhpc.engines.delta.engine import Delta
from dzhpc.engines.delta.propagation import Propagation
from dzhpc.engines.delta.rules import table
from dzhpc.engines.kernels import compiled as programs
from dzhpc.job import processor
from dzhpc.models.cnn import SimpleCNN
from dzhpc.models.resnet import resnet18, resnet20, resnet56
from dzhpc.models.vit import ViT

TOLERANCES = {"fp32": 1e-3, "bf16": 2e-2}
BF16 = "bf16" in processor.instruction_set()


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


@pytest.mark.long  # for every day: test_library, "compiled fp32 beside programs"
@pytest.mark.compiles
@pytest.mark.parametrize("precision", ["fp32", "bf16"] if BF16 else ["fp32"])
@pytest.mark.parametrize("name", ["resnet", "normed"])
def test_close_to_float64_with_a_compiler(name, precision, caplog, monkeypatch):
    compiled, compile_one = [], programs.Programs.compile

    def counted(self, traced, *given):
        compiled.append(programs.largest(traced))
        return compile_one(self, traced, *given)

    monkeypatch.setattr(programs.Programs, "compile", counted)
    engine = check(name, precision, caplog)
    if engine.environment["compiled"] == "False":
        pytest.skip("no compiler here")
    assert compiled
    assert min(compiled) > programs.SMALL
    assert not [line for line in caplog.messages if "not compiled" in line]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not BF16, reason="no bfloat16"))])
@pytest.mark.parametrize("name", FAMILIES)
def test_close_to_float64_without_a_compiler_which_is_said_once(name, precision, caplog):
    engine = check(name, precision, caplog)
    assert engine.environment == {"compiled": "False", "kernels": "none"}
    assert sum("not compiled: no C++ compiler" in line for line in caplog.messages) == 1


@pytest.mark.parametrize("name", ["resnet", "vgg", "normed", "transformer", "dncnn"])
def test_changes_may_travel_in_a_narrower_type_than_the_parameters(name, monkeypatch):
    """Dense ones do, those of one channel (which are small) never; float32's digits are left, no fewer."""
    kinds, advance = set(), Propagation.advance

    def noted(self, run, changes):
        advance(self, run, changes)
        found = [changes[node] for node in run.leaving]
        kinds.update((c.channel is None, c.data.dtype) for c in found if isinstance(c, Change))

    monkeypatch.setattr(Propagation, "advance", noted)
    model, loss, inputs, targets, coords, expected = problem(name)
    engine = Delta(model.double(), loss, travel=torch.float32)
    engine.bind(inputs.double(), targets.double() if loss == "mse" else targets)
    for mu, truth in expected.items():
        assert 1e-9 < relative(engine.differences(coords, mu), truth) < 5e-7
    assert kinds - {(False, torch.float64)} == {(True, torch.float32)}


class Compared(nn.Module):
    """Base values near 1 or 6 that a narrower type cannot tell apart, before an operation that compares them."""

    def __init__(self, function):
        super().__init__()
        self.one, self.two, self.fc, self.function = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3), function

    def forward(self, x):
        return self.fc(self.function(1 + 1e-9 * self.two(self.one(x))).mean((2, 3)))


COMPARING = {
    "max pool": nn.MaxPool2d(2),
    "adaptive max pool": nn.AdaptiveMaxPool2d(2),
    "relu6": lambda x: nn.functional.relu6(5 + x),
}


@pytest.mark.parametrize("name", COMPARING)
def test_base_values_that_are_compared_are_not_rounded(name, monkeypatch):
    model, inputs, labels = Compared(COMPARING[name]).double(), torch.randn(4, 3, 8, 8).double(), torch.arange(4) % 3
    coords = np.arange(model.one.weight.numel() + model.one.bias.numel())
    monkeypatch.setattr(programs, "_obstacle", lambda device, dtype: "")  # float64 is merged, too: only merged runs round

    def differences(travel):
        engine = Delta(model, "cross_entropy", travel=travel)  # engine full would subtract all digits away
        engine.bind(inputs, labels)
        return engine.differences(coords, 0.1)

    truth = differences(torch.float64)
    assert relative(differences(torch.float32), truth) < 1e-6
    for rows in (table.MODULES, table.FUNCTIONS):
        for kind, rule in list(rows.items()):
            monkeypatch.setitem(rows, kind, dataclasses.replace(rule, sharp=False))
    assert relative(differences(torch.float32), truth) > 0.1


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
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n == "resnet56" else ()) for n in NAMED])
def test_named_networks_need_no_way_out(name, train, caplog):
    model = NAMED[name]().train(train)
    inputs = torch.randn(2, 3, 32, 32) if name in ("vit-tiny", "cnn depth 5") else torch.randn(2, 3, 16, 16)
    loss, targets = ("mse", inputs) if name == "dncnn" else ("cross_entropy", torch.randint(0, 10, (2,)))
    with caplog.at_level(logging.INFO, logger="dzhpc"):
        logging.getLogger("dzhpc").propagate = True
        engine = dzhpc.make_engine("delta", model, loss)
        engine.bind(inputs, targets)  # tries every seed
        engine.cut(np.arange(1))  # and every rule
    assert not [line for line in caplog.messages if "no rule" in line or "one coordinate at a time" in line]
    assert [route.refusal for route in engine.routes] == [""] * len(engine.index.names)
    assert all(len(route.nodes) > 1 for route in engine.routes)


def test_cheaper_differences_of_float32_lose_nothing():
    x = torch.cat([3 * torch.randn(4000), torch.tensor([-1e20, -1e4, -50.0, 0.0, 50.0, 1e4, 1e20])])
    tables = differences.gelu_tables(x)
    for size in (1e-6, 1e-3, 0.1, 0.13, 1.0, 20.0):
        d = size * torch.randn(5, len(x))
        found, expected = (
            differences.gelu_difference_by_tables(x, *tables, d),
            differences.gelu_difference(x.double(), d.double()),
        )
        assert float((found - expected)[:, :-1].norm() / expected[:, :-1].norm()) < 5e-7, size  # 1e20 + d is 1e20 in float64, too
        assert torch.equal(found[:, -2:], d[:, -2:]) and not found[:, -7:-5].any()  # the identity, and zero
        relative_errors = differences.expm1(d.clamp(-10, 10)).double() / torch.expm1(d.double().clamp(-10, 10)) - 1
        assert float(relative_errors.abs().max()) < 5e-7, size
