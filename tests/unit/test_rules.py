"""Rules and kernels of a user's own, by the public doors, and what the mechanism makes of their traits."""

import copy
import logging
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from delta_nets import relative
from torch import nn

import dzhpc
from dzhpc.engines.delta import origins
from dzhpc.engines.delta.change import Change, Origin
from dzhpc.engines.delta.rules import table
from dzhpc.engines.delta.rules.rule import Rule
from dzhpc.engines.kernels import find
from dzhpc.engines.kernels.compiled import Programs
from dzhpc.engines.kernels.find import Kernels
from dzhpc.errors import InputError


@pytest.fixture
def said(caplog):
    """What the engines say."""
    logging.getLogger("dzhpc").propagate = True
    with caplog.at_level(logging.INFO, logger="dzhpc"):
        yield lambda: caplog.messages  # a list of its own each time


def both(model, inputs, targets, loss="cross_entropy"):
    """Differences of all coordinates by engine full and by engine delta."""
    engines = [dzhpc.make_engine(kind, model, loss) for kind in ("full", "delta")]
    for engine in engines:
        engine.bind(inputs, targets)
    return [engine.differences(range(engine.index.size), 1e-2) for engine in engines]


class Cubed(nn.Module):
    """scale x^3, by a layer that torch does not have."""

    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels))

    def forward(self, x):
        if x.sum() == 0:  # no trace can look into this
            return x
        return self.scale[:, None, None] * x * x * x


def cubed(op):
    scale = op.d.of(op.module.scale[:, None, None].expand(op.x.shape[1:])[None])
    x, d = op.d.of(op.x), op.d.data
    return op.d.like(scale * d * (3 * x * (x + d) + d * d))


def cubed_scale(op, place, mu):
    cubes = op.cached("cubes", lambda: (op.x**3).movedim(1, 0).contiguous())
    return Origin(lambda cubes, c, mu: cubes[c] * mu, [cubes, place[0], mu], place[0])


def test_a_layer_of_ones_own_gets_a_rule_and_an_origin(said):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), Cubed(4), nn.Conv2d(4, 3, 3), Cubed(3), nn.Flatten(), nn.Linear(12, 3)).double()
    inputs, targets = torch.randn(3, 2, 6, 6).double(), torch.arange(3)
    with pytest.raises(InputError, match="cannot trace"):
        both(model, inputs, targets)
    with (
        mock.patch.dict(table.MODULES, {Cubed: Rule(cubed, fusable=True)}),
        mock.patch.dict(origins.ORIGINS, {(Cubed, "scale"): cubed_scale}),
    ):
        full, delta = both(model, inputs, targets)
    assert relative(delta, full) < 1e-10
    assert not [line for line in said() if "one coordinate at a time" in line]


def test_a_function_of_ones_own_gets_a_rule(said):
    class Sines(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.b(torch.sin(self.a(x)).sin())

    rule = Rule(lambda op: op.d.like(2 * torch.sin(op.d.data / 2) * torch.cos(op.d.of(op.x) + op.d.data / 2)), fusable=True)
    with mock.patch.dict(table.FUNCTIONS, {torch.sin: rule, "sin": rule}):
        full, delta = both(Sines().double(), torch.randn(3, 4).double(), torch.arange(3))
    assert relative(delta, full) < 1e-10
    assert not [line for line in said() if "one coordinate at a time" in line]


class Mirrored(nn.Module):
    """The channels in reverse order: a change of one channel becomes one of another."""

    def forward(self, x):
        return x.flip(1)


def mirrored(op):
    if op.d.channel is None or op.d.axis != 1:
        return Change(op.d.dense(op.x).flip(2))
    return Change(op.d.data, op.x.shape[1] - 1 - op.d.channel, 1)


class Branches(nn.Module):
    """Three one-channel changes of the same shape, two with channels that a run itself makes."""

    def __init__(self):
        super().__init__()
        self.stem, self.mirror, self.fc = nn.Conv2d(2, 4, 3), Mirrored(), nn.Linear(4, 3)
        self.one, self.two, self.three = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        mirrored = self.mirror(x).tanh()
        again = self.mirror(mirrored).sigmoid()
        return self.fc((self.one(mirrored) + self.two(again) + self.three(x.relu())).mean((2, 3)))


@pytest.mark.parametrize("fusable", [True, False])
def test_a_fusable_rule_may_move_a_change_to_another_channel(fusable, said):
    with mock.patch.dict(table.MODULES, {Mirrored: Rule(mirrored, fusable=fusable)}):
        full, delta = both(Branches().double(), torch.randn(2, 2, 5, 5).double(), torch.arange(2))
    assert relative(delta, full) < 1e-10
    assert not [line for line in said() if "one coordinate at a time" in line]


@pytest.mark.compiles
def test_a_moved_channel_leaves_a_compiled_run_too():
    torch.manual_seed(0)
    model, inputs, targets = Branches(), torch.randn(64, 2, 24, 24), torch.arange(64) % 3
    with mock.patch.dict(table.MODULES, {Mirrored: Rule(mirrored, fusable=True)}):
        engine = dzhpc.make_engine("delta", model, "cross_entropy")
        engine.bind(inputs, targets)
        if engine.environment["compiled"] != "True":
            pytest.skip("no compiler here")
        coords = range(0, model.stem.weight.numel(), 5)
        found = engine.differences(coords, 1e-2)
        assert engine.environment["compiled"] == "True"  # it did not fail on the way
    truth = dzhpc.make_engine("full", copy.deepcopy(model).double(), "cross_entropy")
    truth.bind(inputs.double(), targets)
    assert relative(found, truth.differences(coords, 1e-2)) < 1e-4


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.compiles
def test_a_trial_that_raises_leaves_the_engine_as_it_was():
    calls, trouble = [], [RuntimeError("once")]

    def doubled(op):
        calls.append(op.kernels is not None)
        if trouble:
            raise trouble.pop()
        return Change(2 * op.d.dense(op.x))

    model, inputs, targets = nn.Sequential(nn.Linear(8, 256), Doubled()), torch.randn(64, 8), torch.randn(64, 256)
    engine = dzhpc.make_engine("delta", model, lambda outputs, targets: (outputs - targets).abs().mean())
    with mock.patch.dict(table.MODULES, {Doubled: Rule(doubled)}):
        engine.bind(inputs, targets)
        with pytest.raises(RuntimeError, match="once"):
            engine.cut(np.arange(8))
        engine.cut(np.arange(8))
        assert not any(calls)  # trials go without kernels
        calls.clear()
        engine.differences(range(64), 1e-2)
    assert calls and all(str(found) == engine.environment["compiled"] for found in calls)


class Unfolded:
    """Convolutions of stride 1 by a matrix product."""

    name = "unfolded"
    calls = 0

    @staticmethod
    def types(device):
        return [torch.float32]

    @staticmethod
    def fits(conv, like):
        return conv.stride == (1, 1) and conv.groups == 1 and like.dtype == torch.float32

    @staticmethod
    def weights(conv, dtype):
        return conv.weight.flatten(1).to(dtype)

    def convolve(self, conv, data, weights, centred):
        type(self).calls += 1
        images = data.flatten(0, 1)
        size = [n + 2 * p - k + 1 for n, p, k in zip(images.shape[-2:], conv.padding, conv.kernel_size, strict=True)]
        out = weights @ F.unfold(images, conv.kernel_size, padding=conv.padding)
        return out.unflatten(-1, size).unflatten(0, data.shape[:2]), None


class Broken(Unfolded):
    name = "broken"

    def __init__(self):
        raise OSError("no such instruction")


def convolved(provider):
    """(relative error of the differences of a network whose middle layer gets dense changes, what the kernels are called)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 3, padding=1))
    inputs, targets = torch.randn(8, 2, 16, 16), torch.randn(8, 8, 16, 16)
    loss = lambda outputs, targets: ((outputs - targets) ** 2).double().mean()  # noqa: E731
    providers = {"conv2d": [provider, *find.PROVIDERS["conv2d"]]}
    plainly = mock.patch.object(Programs, "compile", lambda self, traced, tensors: traced.forward)  # kernels alone
    with mock.patch.dict(find.PROVIDERS, providers), plainly:
        engine = dzhpc.make_engine("delta", model, loss)
        engine.bind(inputs, targets)
        found = engine.differences(range(16), 0.5)
        compiling = engine.environment["compiled"] == "True"
        names = Kernels(engine.index.device, torch.float32, lambda text: None).names
    truth = dzhpc.make_engine("full", copy.deepcopy(model).double(), loss)
    truth.bind(inputs.double(), targets.double())
    if not compiling:
        pytest.skip("no compiler here")
    return relative(found, truth.differences(range(16), 0.5)), names


@pytest.mark.compiles
def test_a_kernel_of_ones_own_serves_where_it_fits():
    Unfolded.calls = 0
    error, names = convolved(Unfolded)
    assert error < 1e-4
    assert Unfolded.calls == 1
    assert names.split("; ")[0] == "unfolded fp32"


@pytest.mark.compiles
def test_a_kernel_that_cannot_be_made_is_said_once_and_the_next_one_serves(said):
    Broken.calls = 0
    error, names = convolved(Broken)
    assert error < 1e-4
    assert Broken.calls == 0
    assert "broken" not in names
    assert sum("kernel broken is not used: no such instruction" in line for line in said()) == 1
