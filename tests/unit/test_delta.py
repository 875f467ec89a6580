"""Engine delta gives what `full` gives in float64, keeps its digits in fp32, and says what it cannot do in one pass."""

import copy
import itertools
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import HARD
from torch import nn

import dzhpc
from dzhpc.errors import InputError
from dzhpc.models.cnn import SimpleCNN
from dzhpc.models.resnet import resnet20


class VGG(nn.Module):
    """Convolutions with bias, stride, groups and dilation; overlapping max pooling; an affine head by `view`."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.conv3, self.fc = nn.Conv2d(8, 6, (3, 2)), nn.Linear(6, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 3, stride=2, padding=1)
        x = F.avg_pool2d(F.leaky_relu(self.conv2(x), 0.1), 2)
        x = F.adaptive_avg_pool2d(torch.tanh(self.conv3(F.pad(x, (1, 1, 1, 1)))), 1)
        return self.fc(x.view(x.size(0), -1))


class Normed(nn.Module):
    """GroupNorm, BatchNorm without running statistics, smooth activations, gates, concatenation and slices."""

    def __init__(self):
        super().__init__()
        self.conv, self.group, self.batch = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.BatchNorm2d(8, affine=False)
        self.gelu, self.tanh_gelu, self.fc = nn.GELU(), nn.GELU(approximate="tanh"), nn.Linear(16, 10)
        self.scale, self.gate = nn.Parameter(torch.rand(8, 1, 1)), nn.Linear(16, 16)

    def forward(self, x):
        x = self.group(self.conv(x))
        y = self.batch(self.gelu(x) * self.scale - 0.5 * self.tanh_gelu(x))
        z = torch.cat([F.silu(y)[:, ::2], x[:, 4:], torch.sigmoid(y[:, :4]), F.hardtanh(x)[:, :4] / (1 + y[:, 4:] ** 2)], 1)
        z = z.mean((2, 3))
        return self.fc(z * torch.softmax(self.gate(z), -1) + (1 - z))


class TinyTransformer(nn.Module):
    """Patches, class token, position embedding, attention by softmax and by the fused function, LayerNorm, GELU."""

    def __init__(self, width=12, heads=2):
        super().__init__()
        self.patch, self.heads = nn.Conv2d(3, width, 8, stride=8), heads
        self.token, self.position = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width) * 0.1)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv1, self.qkv2 = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.out, self.up, self.down, self.fc = (
            nn.Linear(a, b) for a, b in ((width, width), (width, 24), (24, width), (width, 10))
        )

    def split(self, qkv):
        b, t, c = qkv.shape
        return qkv.reshape(b, t, 3, self.heads, c // 3 // self.heads).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        q, k, v = self.split(self.qkv1(self.norm1(x)))
        a = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1) @ v
        x = x + self.out(a.transpose(1, 2).flatten(2))
        q, k, v = self.split(self.qkv2(self.norm2(x)))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.down(F.gelu(self.up(self.norm3(x))))
        return self.fc(x[:, 0])


class DnCNN(nn.Sequential):
    def __init__(self):
        body = [layer for _ in range(2) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))]
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), *body, nn.Conv2d(8, 3, 3, padding=1))


NETS = [lambda: SimpleCNN(1), lambda: SimpleCNN(3), resnet20, VGG, Normed, TinyTransformer]


def problem(model, size=16, batch=4):
    """(model, loss, inputs, targets, coordinates of every parameter)."""
    inputs = torch.randn(batch, 3, size, size)
    for p in model.parameters():  # no parameter at a special value
        p.data += 0.05 * torch.randn_like(p)
    offsets = np.cumsum([0] + [p.numel() for p in model.parameters()])
    rng = np.random.default_rng(0)
    coords = np.concatenate([rng.integers(a, b, 4) for a, b in itertools.pairwise(offsets)])
    return inputs, torch.randint(0, 10, (batch,)), coords


def relative(found, expected):
    """Norm of the error, relative to the norm of the truth."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", NETS)
def test_differences_equal_those_of_full_in_float64(make, train):
    model = make().double().train(train)
    inputs, labels, coords = problem(model)
    full, delta = (dzhpc.make_engine(kind, model, "cross_entropy") for kind in ("full", "delta"))
    assert full.bind(inputs.double(), labels) == pytest.approx(delta.bind(inputs.double(), labels), rel=1e-12)
    for mu in (5e-3, 1e-4, -1e-2):
        assert relative(delta.differences(coords, mu), full.differences(coords, mu)) < 1e-8
    assert delta.queries == full.queries


def test_mean_squared_error_of_a_denoiser_and_a_loss_of_ones_own():
    model = DnCNN().double()
    inputs, _, coords = problem(model)
    own = lambda outputs, targets: (outputs - targets).abs().mean()  # noqa: E731
    for loss in ("mse", own):
        full, delta = (dzhpc.make_engine(kind, model, loss) for kind in ("full", "delta"))
        for engine in (full, delta):
            engine.bind(inputs.double(), inputs.double().tanh())
        assert relative(delta.differences(coords, 1e-3), full.differences(coords, 1e-3)) < 1e-8


@pytest.mark.parametrize("name", ["tied", "in place", "unused", "custom", "recurrent", "frozen", "running mean", "own loss"])
def test_awkward_networks_are_exact_too(name):
    model, (inputs, targets), loss, _ = HARD[name]()
    full, delta = (dzhpc.make_engine(kind, copy.deepcopy(model), loss) for kind in ("full", "delta"))
    for engine in (full, delta):
        engine.bind(inputs, targets)
    coords = np.arange(full.index.size)
    assert relative(delta.differences(coords, 1e-3), full.differences(coords, 1e-3)) < 1e-8
    assert all(torch.equal(a, b) for a, b in zip(full.model.buffers(), delta.model.buffers(), strict=True))


def test_fp32_keeps_its_digits_where_subtraction_loses_them():
    model = SimpleCNN(2, width=6)
    inputs, labels, coords = problem(model, batch=16)
    truth = dzhpc.make_engine("full", copy.deepcopy(model).double(), "cross_entropy")
    truth.bind(inputs.double(), labels)
    errors = {}
    for kind in ("reuse", "delta"):
        engine = dzhpc.make_engine(kind, model, "cross_entropy")
        engine.bind(inputs, labels)
        errors[kind] = relative(engine.differences(coords, 1e-4), truth.differences(coords, 1e-4))
    assert errors["delta"] < 1e-4
    assert errors["reuse"] > 10 * errors["delta"]


def test_any_order_duplicates_and_the_company_of_others_give_the_same_bits():
    model = SimpleCNN(2, width=6)
    inputs, labels, _ = problem(model)
    engine = dzhpc.make_engine("delta", model, "cross_entropy")
    engine.bind(inputs, labels)
    coords = np.arange(0, engine.index.size, 7)
    whole, order = engine.differences(coords, 1e-3), np.random.default_rng(0).permutation(len(coords))
    assert torch.equal(engine.differences(coords[order], 1e-3), whole[torch.from_numpy(order)])
    assert torch.equal(engine.differences(np.repeat(coords[:3], 2), 1e-3), whole[[0, 0, 1, 1, 2, 2]])
    pieces = [engine.differences(coords[c.start : c.stop], 1e-3) for c in engine.cut(coords)]
    assert torch.equal(torch.cat(pieces), whole)


def test_an_operation_without_a_rule_is_exact_and_named_once(caplog):
    class Sine(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 10)

        def forward(self, x):
            return self.b(torch.sin(self.a(x)))

    model = Sine().double()
    inputs, labels = torch.randn(4, 5).double(), torch.randint(0, 10, (4,))
    full, delta = (dzhpc.make_engine(kind, model, "cross_entropy") for kind in ("full", "delta"))
    with caplog.at_level(logging.INFO, logger="dzhpc"):
        logging.getLogger("dzhpc").propagate = True
        for engine in (full, delta):
            engine.bind(inputs, labels)
        coords = np.arange(full.index.size)
        assert relative(delta.differences(coords, 1e-3), full.differences(coords, 1e-3)) < 1e-8
        delta.differences(coords, 1e-3)
    assert sum("sin has no rule" in message for message in caplog.messages) == 1


def test_a_budget_too_small_for_one_coordinate_is_refused_by_its_key():
    model = SimpleCNN(1)
    inputs, labels, _ = problem(model)
    engine = dzhpc.make_engine("delta", model, "cross_entropy", memory_mb=1e-3)
    engine.bind(inputs, labels)
    with pytest.raises(InputError, match=r"zo\.memory_mb = 0\.001: one coordinate of features.0.weight needs"):
        engine.differences([0], 1e-3)
