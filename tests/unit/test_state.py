"""Networks that move something in forward (buffers, attributes, random generators): every query starts from one state."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import by_copies
from torch import nn
from torch.nn.utils import parametrizations

import dzhpc
from dzhpc.engines.pinned import Pinned
from dzhpc.engines.traced import Traced
from dzhpc.errors import InputError


class Body(nn.Module):
    """stem -> ``middle`` -> fc, and something to keep state in."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)
        self.register_buffer("m", torch.zeros(4, 1, 1))
        self.register_buffer("bank", torch.zeros(2, 4, 1, 1))
        self.register_buffer("absent", None)
        self.count, self.own, self.rng = 0, torch.zeros(4, 1, 1), np.random.default_rng(0)
        self.prepare()

    def prepare(self):
        pass

    def middle(self, x):
        return self.inner(x)

    def forward(self, x):
        return self.fc(torch.tanh(self.middle(self.stem(x))).mean((2, 3)))


def net(middle, prepare=lambda self: None):
    return type("Net", (Body,), {"middle": middle, "prepare": prepare})().double()


def batch():
    return torch.randn(3, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 3, 4])


def mean(x):
    return x.detach().mean((0, 2, 3))[:, None, None]


def layer(make):
    return lambda self: setattr(self, "inner", make(nn.Conv2d(4, 4, 3, padding=1)))


def hooked(self):
    """A hook with a running mean in a buffer of its module."""
    self.inner.register_buffer("k", torch.zeros(4, 1, 1))

    def subtract(module, inputs, output):
        module.k.mul_(0.5).add_(mean(output))
        return output - module.k

    self.inner.register_forward_hook(subtract)


def lagged(self, x):
    """Reads its buffer before it writes to it."""
    x = self.inner(x)
    out = x - self.m
    self.m.copy_(mean(x))
    return out


def functional(self, x):
    return F.batch_norm(self.inner(x), self.m.view(4), self.bank[0].view(4), training=True)


def twice(self, x):
    return self.inner(torch.tanh(self.inner(x)))


KEEPS_STATE = {
    "spectral norm": (Body.middle, layer(parametrizations.spectral_norm)),
    "spectral norm by hooks": (Body.middle, layer(nn.utils.spectral_norm)),
    "spectral norm twice": (twice, layer(parametrizations.spectral_norm)),
    "a hook": (Body.middle, hooked),
    "lagged": (lagged, lambda self: None),
    "functional": (functional, lambda self: None),
}


@pytest.mark.parametrize("kind", ["full", "reuse", "delta"])
@pytest.mark.parametrize("name", KEEPS_STATE)
def test_every_query_of_a_network_that_keeps_state_starts_from_the_state_of_the_base_pass(name, kind):
    model, (x, y) = net(*KEEPS_STATE[name]), batch()
    with torch.no_grad():
        model(x + 1)  # some history
    coords = [0, 50, 107, 108, 120, 200, 255, 260, 275]
    expected = by_copies(model, "cross_entropy", x, y, coords, 0.01)
    engine = dzhpc.make_engine(kind, model, "cross_entropy")
    engine.bind(x, y)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    found = engine.differences(coords, 0.01)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-14 if kind == "delta" else 0)
    assert torch.equal(engine.differences(coords, 0.01), found)
    assert all(torch.equal(b, buffers[key]) for key, b in model.named_buffers())


def test_a_module_that_had_moved_its_state_before_a_tail_begins_goes_on_from_there():
    class Late(Body):
        """The parametrized layer runs before the layer that is perturbed, and behind it."""

        def forward(self, x):
            return self.fc(self.inner(torch.tanh(self.stem(x + self.inner(x[:, :1].expand(-1, 4, -1, -1))[:, :3]))).mean((2, 3)))

        def prepare(self):
            layer(parametrizations.spectral_norm)(self)

    model, (x, y) = Late().double(), batch()
    expected = by_copies(model, "cross_entropy", x, y, range(0, 112, 10), 0.01)
    for kind in ("reuse", "delta"):
        engine = dzhpc.make_engine(kind, copy.deepcopy(model), "cross_entropy")
        engine.bind(x, y)
        assert torch.allclose(engine.differences(range(0, 112, 10), 0.01), expected, rtol=1e-9)


def copied(self, x):
    x = self.inner(x)
    self.m.copy_(mean(x))
    return x - self.m


def added(self, x):
    x = self.inner(x)
    return x - self.m.mul_(0.9).add_(mean(x))


def largest(self, x):
    x = self.inner(x)
    torch.maximum(self.m, x.detach().amax((0, 2, 3))[:, None, None], out=self.m)
    return x / (1 + self.m)


def in_a_module(self, x):
    return self.norm(self.inner(x)) - self.norm.running_mean[:, None, None]


def by_a_view(self, x):
    x = self.inner(x)
    self.bank[0].add_(mean(x))
    return x


def indexed(self, x):
    x = self.inner(x)
    self.bank[0] = mean(x)
    return x - self.bank.mean(0)


def assigned(self, x):
    x = self.inner(x)
    self.m = 0.5 * self.m + mean(x)
    return x - self.m


def first_seen(self, x):
    x = self.inner(x)
    self.absent = mean(x) if self.absent is None else 2 * self.absent
    return x - self.absent


READS_AGAIN = {
    copied: r"Net overwrites its buffer m \(by copy_\) and reads it again \(by sub\)",
    added: r"Net overwrites its buffer m \(by mul_\) and reads it again",
    largest: r"Net overwrites its buffer m \(by maximum\) and reads it again",
    in_a_module: r"Net overwrites its buffer norm.running_mean \(by norm\) and reads it again",
    by_a_view: "the trace of Net leaves another bank",
    indexed: "self.bank.0. = mean",
    assigned: "Net assigns its buffer m in forward",
    first_seen: "Net assigns its buffer absent in forward",
}


@pytest.mark.parametrize("middle", READS_AGAIN)
def test_a_buffer_that_is_written_and_read_again_is_refused_by_name_and_full_takes_it(middle):
    model, (x, y) = net(middle, lambda self: setattr(self, "norm", nn.BatchNorm2d(4))), batch()
    for kind in ("reuse", "delta"):
        with pytest.raises(InputError, match=f'{READS_AGAIN[middle]}.*use engine = "full"'):
            dzhpc.make_engine(kind, copy.deepcopy(model), "cross_entropy").bind(x, y)
    expected = by_copies(model, "cross_entropy", x, y, range(0, 100, 9), 0.01)
    engine = dzhpc.make_engine("full", model, "cross_entropy")
    engine.bind(x, y)
    assert torch.equal(engine.differences(range(0, 100, 9), 0.01), expected)
    assert torch.equal(engine.differences(range(0, 100, 9), 0.01), expected)


def counted(self, x):
    self.count += 1
    return self.inner(x) / self.count


def attribute(self, x):
    x = self.inner(x)
    self.own = 0.5 * self.own + mean(x)
    return x - self.own


def own_generator(self, x):
    return self.inner(x) * float(self.rng.random())


@pytest.mark.parametrize("middle", [counted, attribute, own_generator])
def test_state_that_is_no_buffer_is_refused_where_a_trace_would_freeze_it(middle):
    model, (x, y) = net(middle), batch()
    for kind in ("reuse", "delta"):
        with pytest.raises(InputError, match="Net gives something else each time it is asked: it keeps state that is no buffer"):
            dzhpc.make_engine(kind, copy.deepcopy(model), "cross_entropy").bind(x, y)


def test_a_feature_that_is_kept_as_an_attribute_is_no_state_and_tracing_leaves_attributes_alone():
    def middle(self, x):
        self.own = self.inner(x)
        return self.own

    model, (x, y) = net(middle), batch()
    before = model.own
    Traced(model, list(model.parameters()))
    assert model.own is before
    expected = by_copies(model, "cross_entropy", x, y, range(0, 100, 9), 0.01)
    engine = dzhpc.make_engine("delta", model, "cross_entropy")
    engine.bind(x, y)
    assert torch.allclose(engine.differences(range(0, 100, 9), 0.01), expected, rtol=1e-9)


DRAWS = {
    "NumPy's global generator": lambda self, x: self.inner(x) if np.random.rand() < 0.5 else 2 * self.inner(x),
    "Python's random": lambda self, x: self.inner(x) * random.random(),
    "NumPy's global": lambda self, x: self.inner(x) + torch.from_numpy(np.random.randn(4, 1, 1)),
}


@pytest.mark.parametrize("generator", DRAWS)
def test_numbers_drawn_from_numpy_or_python_are_the_same_for_each_query_and_refused_where_a_trace_would_freeze_them(generator):
    model, (x, y) = net(DRAWS[generator]), batch()
    engine = dzhpc.make_engine("full", model, "cross_entropy")
    engine.bind(x, y)
    before = np.random.get_state()[1].tolist(), random.getstate()
    first = engine.differences(range(0, 100, 9), 1e-4)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before
    np.random.rand(3), random.random()
    assert torch.equal(engine.differences(range(0, 100, 9), 1e-4), first)
    assert first.abs().max() < 1e-3
    for kind in ("reuse", "delta"):
        with pytest.raises(InputError, match=f'Net draws random numbers from {generator}.*use engine = "full"'):
            dzhpc.make_engine(kind, model, "cross_entropy").bind(x, y)


def test_pinned_puts_back_generators_values_and_the_registered_tensors():
    model = net(Body.middle)
    pinned, m = Pinned(model, torch.device("cpu")), model.m
    with pinned.unchanged():
        expected = torch.rand(2).tolist(), np.random.rand(), random.random()
        m.add_(1)
        model.m, model.absent = m + 1, m
        model.register_buffer("fresh", torch.ones(2))
    assert (torch.rand(2).tolist(), np.random.rand(), random.random()) == expected
    assert model.m is m and not m.any() and model.absent is None and "fresh" not in dict(model.named_buffers())


def test_a_parameter_that_is_overwritten_in_forward_is_refused():
    model, (x, y) = (
        net(
            lambda self, x: x + self.table(torch.arange(4)).mean(), lambda s: setattr(s, "table", nn.Embedding(4, 2, max_norm=1))
        ),
        batch(),
    )
    for kind in ("full", "reuse", "delta"):
        with pytest.raises(InputError, match=r"Net overwrites its parameter table.weight in forward"):
            dzhpc.make_engine(kind, model, "cross_entropy").bind(x, y)


def test_a_trace_leaves_nothing_in_what_a_network_collects():
    """Its last features, say, in a dict: those of a trace are no numbers, and the network itself would read them."""

    def remembered(self, x):
        x = self.inner(x)
        self.last.setdefault("mean", x.detach().mean())
        self.seen.append(x.shape)
        return x + self.last["mean"]

    model, (x, y) = net(remembered, lambda self: vars(self).update(last={}, seen=[])), batch()
    Traced(model, list(model.parameters()))
    assert (model.last, model.seen) == ({}, [])
    assert torch.isfinite(dzhpc.make_engine("full", model, "cross_entropy").bind(x, y) * torch.ones(1))
    assert isinstance(model.last["mean"], torch.Tensor) and model.seen == [(3, 4, 6, 6)]
