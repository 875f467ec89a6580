"""Random networks of every operation that engine delta has rules for: its differences are those of `full`, without fall-backs."""

import logging
import operator
import os
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from delta_operations import PIECES
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import nn

import dzhpc
from dzhpc.engines.delta import origins
from dzhpc.engines.delta.rules import table
from dzhpc.engines.delta.rules.rule import Rule

EXAMPLES = int(os.environ.get("DZHPC_EXAMPLES", "40"))
MUS = (5e-3, 1e-4)
NAMES = [name for name in table.FUNCTIONS if isinstance(name, str)]
SEEN: set = set()  # the operations that changes went through, and the origins that they came from


class Said(logging.Handler):
    """What the package logs while ``with`` lasts."""

    def __init__(self):
        super().__init__()
        self.lines, self._log = [], logging.getLogger("dzhpc")

    def emit(self, record):
        self.lines.append(record.getMessage())

    def __enter__(self):
        self._before = self._log.level
        self._log.setLevel(logging.INFO)
        self._log.addHandler(self)
        return self

    def __exit__(self, *error):
        self._log.removeHandler(self)
        self._log.setLevel(self._before)


class Draw:
    """Choices from a numpy generator."""

    def __init__(self, number):
        self.random = np.random.default_rng(number)

    def integer(self, low, high):
        return int(self.random.integers(low, high + 1))

    def choice(self, items):
        return items[self.integer(0, len(items) - 1)]

    def yes(self):
        return self.integer(0, 1) == 1


class Chain(nn.Module):
    """Pieces one after another, then a linear head on what is left."""

    def __init__(self, pieces, head):
        super().__init__()
        self.pieces, self.head = nn.ModuleList(pieces), head

    def forward(self, x):
        for piece in self.pieces:
            x = piece(x)
        return self.head(x.flatten(1))


def network(keys, x, draw, train):
    """A network of the pieces with these keys, in float64; those that do not fit where they would stand are left out."""
    pieces, inside = [], []
    for key in keys:
        piece = PIECES[key](draw, x)
        if piece is None:
            continue
        piece = piece.double()
        switched = [m for m in piece.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))]
        for m in switched:
            m.train(train)
        try:
            with torch.no_grad():
                y = piece(x.clone())
        except (
            RuntimeError,
            ValueError,
            IndexError,
            TypeError,
        ):  # torch's own refusal: a window wider than the image and the like
            continue
        if y.ndim < 2 or len(y) != len(x) or not 0 < y.numel() <= 3000 or float(y.detach().abs().max()) > 1e3:
            continue
        pieces.append(piece)
        inside.append(key)
        x = y.detach()
    model = Chain(pieces, nn.Linear(x.flatten(1).shape[1], 3).double())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, inside


def compare(model, x, draw, mu):
    """Both engines on a few coordinates of every parameter; notes what the changes went through."""
    loss = draw.choice(["cross_entropy", "mse"])
    targets = torch.randint(0, 3, (len(x),)) if loss == "cross_entropy" else torch.randn(len(x), 3).double()
    full, delta = (dzhpc.make_engine(kind, model, loss) for kind in ("full", "delta"))
    said = Said()
    coords, first = [], 0
    for p in full.index.parameters:
        coords += {first, first + p.numel() - 1, first + draw.integer(0, p.numel() - 1)}
        first += p.numel()
    with mock.patch.object(table, "FALLBACK", Rule(_no_fallback, several=True)), said:
        base = full.bind(x.clone(), targets)
        delta.bind(x.clone(), targets)
        expected, found = full.differences(coords, mu), delta.differences(coords, mu)
        assert torch.isfinite(expected).all(), "the example itself is out of range"
        # what full loses by subtraction: a few units in the last place of the loss
        error, room = (found - expected).norm(), 1e-8 * expected.norm() + 1e-14 * len(coords) * (1 + abs(base))
        assert error <= room, (float(error), float(expected.norm()), mu)
    assert not [route.refusal for route in delta.routes if route.refusal]
    assert not [line for line in said.lines if "rule" in line or "one coordinate" in line]
    note(delta)


def _no_fallback(op):
    raise AssertionError(f"{op.module or op.run} fell back")


def note(delta):
    """What the changes of an engine went through."""
    names: dict = {}
    for name in NAMES:
        for home in (torch, F, operator):
            names.setdefault(getattr(home, name, None), set()).add(name)
    for owner, route in enumerate(delta.routes):
        for node in route.nodes[:-1]:
            module = delta.model.get_submodule(node.target) if node.op == "call_module" else None
            own = dict(module.named_parameters()) if module else {}
            SEEN.update((type(module), name) for name, p in own.items() if p is delta.index.parameters[owner])
            SEEN.update([type(module)] if module else {node.target} if node.op == "call_method" else names.get(node.target, ()))
            if node.op == "get_attr":
                SEEN.add("a parameter by itself")


def batch(draw):
    """Images, now and then as small, narrow or alone as they come; sometimes channels-last, sometimes with exact zeros."""
    shape = draw.integer(1, 4), draw.integer(1, 4), draw.choice([1, 2, 5, 6]), draw.choice([1, 3, 6, 7])
    x = torch.randn(shape).double() * draw.choice([1.0, 1.0, 0.1, 3.0])
    if draw.yes():
        x = x.to(memory_format=torch.channels_last)
    if draw.integer(0, 3) == 0:
        x = x.relu()
    return x


def stem(draw, x):
    """What gives the first operation a change: of one channel, or of everything."""
    kind = draw.integer(0, 3)
    if kind == 0 and x.ndim == 4:
        return nn.Conv2d(x.shape[1], draw.integer(1, 4), draw.choice([1, 3]), padding="same")
    return nn.Linear(x.shape[-1], draw.integer(1, 6)) if kind < 3 else PIECES["add"](draw, x)


def run(number, keys, shape=None, train=True):
    draw = Draw(number)
    torch.manual_seed(number)
    x = batch(draw)
    if shape == "tokens":
        x = x.flatten(2)
    elif shape == "features":
        x = x.flatten(1)
    with mock.patch.dict(PIECES, {"stem": lambda draw, x: stem(draw, x)}):
        model, inside = network(["stem", *keys], x, draw, train)
    compare(model, x, draw, MUS[number % 2])
    return inside


@pytest.mark.parametrize("key", PIECES, ids=str)
def test_every_operation_alone(key):
    fitting = 0
    for number in range(2):
        for shape in ("images", "tokens", "features"):
            fitting += key in run(number, [key], shape, train=number % 2 == 0)
    assert fitting >= 2


@seed(0)
@settings(max_examples=EXAMPLES, derandomize="DZHPC_EXAMPLES" not in os.environ, database=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from(list(PIECES)), min_size=2, max_size=6),
    st.sampled_from(["images", "images", "tokens", "features"]),
    st.booleans(),
)
def test_random_networks(number, keys, shape, train):
    run(number, keys, shape, train)


def test_every_rule_and_every_origin_was_at_work():
    expected = {*table.MODULES, *NAMES, *origins.ORIGINS, "a parameter by itself"}
    assert expected - SEEN == set()
