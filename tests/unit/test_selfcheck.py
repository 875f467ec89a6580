"""The self-check before a run: silent on healthy networks, however hard; loud where an engine or the network is wrong."""

import copy
import dataclasses
import logging
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from delta_nets import VGG, DnCNN, Normed, TinyTransformer
from nets import HARD, Dropout, images
from torch import nn

import dzhpc
from dzhpc.engines import selfcheck
from dzhpc.engines.delta.rules import table
from dzhpc.engines.kernels import compiled, library
from dzhpc.engines.moved import Moved
from dzhpc.engines.traced import Traces
from dzhpc.errors import InputError
from dzhpc.models.resnet import resnet20


class Middle(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.stem, self.norm, self.fc, self.middle = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 10), middle

    def forward(self, x):
        return self.fc(self.middle(self, self.norm(self.stem(x))).mean((2, 3)))


def rounded(t, levels):
    scale = t.detach().abs().max() / levels
    return (t / scale).round() * scale


HEALTHY = {
    "resnet20": resnet20,
    "a scale of zero": lambda: Middle(lambda s, x: x + 0 * s.norm.weight[:, None, None] * s.norm(x)),
    "VGG": VGG,
    "groups": Normed,
    "transformer": TinyTransformer,
    "dead channels": lambda: Middle(lambda s, x: torch.relu(s.norm(torch.relu(x - 100)))),
    "signs of dead channels": lambda: Middle(lambda s, x: torch.sign(s.norm(torch.relu(x - 100)))),
    "signs": lambda: Middle(lambda s, x: torch.sign(x)),
    "quantised features": lambda: Middle(lambda s, x: rounded(torch.relu(x), 7)),
    "quantised weights": lambda: Middle(lambda s, x: F.conv2d(x, rounded(s.stem.weight.repeat(1, 2, 1, 1)[:, :4], 127))),
    "float32 inside": lambda: Middle(lambda s, x: F.softmax(x.float(), 1).to(x.dtype)),
    "bfloat16 inside": lambda: Middle(lambda s, x: torch.relu(x.bfloat16()).to(x.dtype)),
    "float16 inside": lambda: Middle(lambda s, x: F.gelu(x.half()).to(x.dtype)),
    "winner takes all": lambda: Middle(lambda s, x: x * F.one_hot(x.argmax(1), 4).permute(0, 3, 1, 2)),
    "tiny": lambda: Middle(lambda s, x: 1e-7 * x),
    "huge": lambda: Middle(lambda s, x: 1e7 * x),
    "spectral norm": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    ),
}


def bound(kind, model, batch, loss="cross_entropy", **how):
    engine = dzhpc.make_engine(kind, model, loss, **how)
    engine.bind(*batch)
    return engine


def agreement(line):
    return float(re.fullmatch(r"engine (?:reuse|delta) agrees with full on \d+ coordinates to (\S+)", line)[1])


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n == "resnet20" else ()) for n in HEALTHY])
def test_engines_agree_on_healthy_networks(name):
    model, batch = HEALTHY[name](), images(16, 12)
    assert selfcheck.check(bound("full", copy.deepcopy(model), batch), 3) == "engine full gives the same again on 8 coordinates"
    assert agreement(selfcheck.check(bound("reuse", copy.deepcopy(model), batch), 3)) == 0
    assert agreement(selfcheck.check(bound("delta", model, batch), 3)) < (1e-3 if "float" in name else 1e-6)


@pytest.mark.parametrize("name", [name for name in HARD if name not in ("own loss", "resnet20", "cnn depth 3")])
def test_engines_agree_on_networks_that_are_hard_on_an_engine(name):
    model, batch, loss, _ = HARD[name]()
    assert agreement(selfcheck.check(bound("delta", model, batch, loss), 5)) < 1e-6


def test_a_denoiser_agrees():
    inputs = torch.rand(9, 3, 16, 16)
    assert agreement(selfcheck.check(bound("delta", DnCNN(), (inputs, inputs), "mse"), 0)) < 1e-6


def test_random_numbers_of_torch_are_healthy_for_full():
    inputs = torch.rand(9, 4)
    assert "same again" in selfcheck.check(bound("full", Dropout(), (inputs, inputs), "mse"), 0)


def test_nothing_moves_and_nothing_is_said(caplog):
    caplog.set_level(logging.INFO, "dzhpc")
    model = HEALTHY["spectral norm"]()
    engine = bound("delta", model, images(8, 9))
    first = engine.differences([0, 1], 1e-3)
    said, queries = [r.name for r in caplog.records].count("dzhpc"), engine.queries
    state, random = copy.deepcopy(model.state_dict()), (torch.get_rng_state(), np.random.get_state()[1].tolist())
    selfcheck.check(engine, 0)
    assert engine.queries == queries
    assert [r.name for r in caplog.records].count("dzhpc") == said
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random[0]) and np.random.get_state()[1].tolist() == random[1]
    assert torch.equal(engine.differences([0, 1], 1e-3), first)


def test_a_black_box_and_a_callable_are_not_asked():
    asked = []
    loss = lambda out, y: asked.append(1) or out.square().mean()  # noqa: E731
    engine = bound("full", nn.Linear(4, 4), (torch.rand(9, 4), torch.rand(9, 4)), loss)
    assert selfcheck.check(engine, 0) == "" and len(asked) == 1
    w = torch.randn(4, 4)
    engine = bound("full", lambda x: x @ w, (torch.rand(9, 4), torch.rand(9, 4)), "mse", parameters={"w": w})
    assert selfcheck.check(engine, 0) == ""


@pytest.mark.parametrize("factor", [1.3, 0.5, 0.0, -1.0])
def test_a_wrong_rule_is_found(factor, monkeypatch):
    right = table.MODULES[nn.GELU]
    wrong = dataclasses.replace(right, function=lambda op: op.d.like(right.function(op).data * factor))
    monkeypatch.setitem(table.MODULES, nn.GELU, wrong)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    with pytest.raises(
        InputError, match=r'engine "delta" is wrong about Sequential; use zo.engine = "full" \(0\.\w+\[.*by full, '
    ):
        selfcheck.check(bound("delta", model, images(16, 12)), 0)
    assert agreement(selfcheck.check(bound("reuse", model, images(16, 12)), 0)) == 0


def test_a_rule_that_forgets_the_state_of_its_module_is_found(monkeypatch):
    """Spectral norm's power iteration goes on and on if its buffers are not put back."""
    monkeypatch.setattr(Moved, "put_back", lambda *_: None)
    model = HEALTHY["spectral norm"]()
    nn.init.normal_(model[1].parametrizations.weight.original)  # as after training steps: the iteration is not at its end
    with pytest.raises(InputError, match='engine "delta" is wrong about Sequential'):
        selfcheck.check(bound("delta", model, images(16, 12)), 0)


def test_a_buffer_that_is_read_again_unseen_is_found(monkeypatch):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)
            self.register_buffer("m", torch.zeros(8))

        def forward(self, x):
            x = torch.tanh(self.a(x))
            self.m.copy_(x.detach().mean(0))
            return self.b(x - self.m)

    monkeypatch.setattr(Moved, "conflict", lambda *_: None)
    for kind in ("reuse", "delta"):
        with pytest.raises(InputError, match=f'engine "{kind}" is wrong about Centred'):
            selfcheck.check(bound(kind, Centred(), (torch.rand(9, 4), torch.rand(9, 4)), "mse"), 0)


class Restless(nn.Module):
    """Keeps a number as an attribute, or draws from a generator that nobody knows."""

    def __init__(self, middle):
        super().__init__()
        self.a, self.b, self.middle, self.rng, self.calls = nn.Linear(4, 8), nn.Linear(8, 4), middle, np.random.default_rng(0), 0

    def forward(self, x):
        return self.b(self.middle(self, torch.tanh(self.a(x))))


def count(s, x):
    s.calls += 1
    return x / s.calls


def carry(s, x):
    """What one query leaves moves the next one: two times the same order would not show it."""
    last, s.last = getattr(s, "last", 0.0), 3 * x.detach().mean()
    return x + last


RESTLESS = {
    "the last features": carry,
    "a generator": lambda s, x: x * (1 + s.rng.random()),
    "layer drop": lambda s, x: x if s.rng.random() < 0.3 else 2 * x,
    "a counter": count,
}


@pytest.mark.parametrize("name", RESTLESS)
def test_a_network_that_is_another_one_at_each_query_is_found(name, monkeypatch):
    batch = torch.rand(9, 4), torch.rand(9, 4)
    with pytest.raises(InputError, match=r"Restless is another network at each query: it keeps state that is no buffer.*by full"):
        selfcheck.check(bound("full", Restless(RESTLESS[name]), batch, "mse"), 0)
    monkeypatch.setattr(Traces, "_compare", lambda *_: None)  # the net below is taken away
    with pytest.raises(InputError, match="Restless"):
        selfcheck.check(bound("reuse", Restless(RESTLESS[name]), batch, "mse"), 0)


def test_what_does_not_run_in_float64_is_left_alone_and_the_line_says_so():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) @ torch.eye(4)

    line = selfcheck.check(bound("delta", Single(), (torch.rand(9, 4), torch.rand(9, 4)), "mse"), 0)
    assert line.startswith("engine delta was not tried beside full, since no copy of the network runs in float64: RuntimeError")


def test_numbers_that_are_not_finite_are_left_to_the_trainer():
    line = selfcheck.check(bound("delta", Middle(lambda s, x: x / 0), images(16, 12)), 0)
    assert "agrees" in line


def test_the_check_begins_where_the_base_pass_began():
    """A buffer that the first pass makes: delta would go on with that of the base pass, engine full makes it anew each time."""

    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 4))
    model[1][0].register_forward_pre_hook(
        lambda m, i: m.register_buffer("scale", i[0].detach().square().mean().sqrt()) if not hasattr(m, "scale") else None
    )
    model[1][0].register_forward_hook(lambda m, i, out: out / m.scale)
    with pytest.raises(InputError, match='engine "delta" is wrong about Sequential'):
        selfcheck.check(bound("delta", model, (torch.rand(9, 4), torch.rand(9, 4)), "mse", queries=0), 0)


def untraced(monkeypatch):
    """Compiled but for torch's compiler, which takes seconds."""
    monkeypatch.setattr(compiled.Programs, "compile", lambda self, traced, samples: traced.forward)


@pytest.mark.compiles
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n == "resnet20" else ()) for n in HEALTHY])
def test_compiled_passes_agree_on_healthy_networks(name, precision, monkeypatch):
    untraced(monkeypatch)
    inputs, labels = images(16, 17)
    engine = bound(
        "delta", HEALTHY[name]().float(), (inputs.float(), labels), precision=precision, emulate_bf16=True, queries=math.inf
    )
    state = copy.deepcopy(engine.model.state_dict())
    for seed in range(3):
        selfcheck.check_compiled(engine, seed)
    assert engine.queries == 1 and all(torch.equal(t, state[key]) for key, t in engine.model.state_dict().items())


@pytest.mark.compiles
@pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler")
def test_a_compiled_pass_that_is_wrong_is_found(monkeypatch):
    untraced(monkeypatch)
    carry = library.Library.carry
    monkeypatch.setattr(library.Library, "carry", lambda self, *args: carry(self, *args) * 1.5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    engine = bound("delta", model, images(10, 16), queries=math.inf)
    with pytest.raises(InputError, match=r'compiled for engine "delta" is wrong about Sequential; use zo.compile = "off" \('):
        selfcheck.check_compiled(engine, 0)
