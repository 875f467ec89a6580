"""Engine delta gives what `full` gives in float64, keeps its digits in fp32, and says what it cannot do in one pass."""

import copy
import gc
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from delta_nets import VGG, DnCNN, Normed, TinyTransformer, problem, relative
from nets import HARD
from torch import nn

import dzhpc
from dzhpc.engines.delta.change import Change
from dzhpc.engines.delta.propagation import Propagation
from dzhpc.errors import InputError
from dzhpc.models.cnn import SimpleCNN
from dzhpc.models.resnet import resnet20

NETS = [lambda: SimpleCNN(1), lambda: SimpleCNN(3), resnet20, VGG, Normed, TinyTransformer]


def both(model, inputs, targets, loss="cross_entropy"):
    """Engines full and delta, bound to the same batch."""
    engines = [dzhpc.make_engine(kind, model, loss) for kind in ("full", "delta")]
    for engine in engines:
        engine.bind(inputs, targets)
    return engines


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", [pytest.param(net, marks=pytest.mark.long if net is resnet20 else ()) for net in NETS])
def test_differences_equal_those_of_full_in_float64(make, train):
    model = make().double().train(train)
    inputs, labels, coords = problem(model, size=8 if make is resnet20 else 16)
    coords = coords.reshape(-1, 4)[::4].ravel() if make is resnet20 else coords  # every fourth parameter has all kinds
    full, delta = (dzhpc.make_engine(kind, model, "cross_entropy") for kind in ("full", "delta"))
    assert full.bind(inputs.double(), labels) == pytest.approx(delta.bind(inputs.double(), labels), rel=1e-12)
    for mu in (5e-3, -1e-2) if make is resnet20 else (5e-3, 1e-4, -1e-2):
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


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 5), nn.Linear(5, 3), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


BY_CHOICE = {
    "truth values": lambda y: y * (y > 0),
    "where": lambda y: torch.where(y > 0.1, y, 2 * y),
    "sorted": lambda y: y[:, y.argsort(1)[0]],
    "gather": lambda y: y.gather(1, y.argmax(1, keepdim=True).expand(-1, 5)),
    "keyword list": lambda y: torch.cat(tensors=[y[:, :2], y[:, 2:]], dim=1),
    "infinite where it is masked": lambda y: y.masked_fill(torch.eye(3, 5).bool(), -torch.inf).softmax(1),
}


@pytest.mark.parametrize("name", BY_CHOICE)
def test_what_a_change_cannot_travel_through_is_evaluated_one_by_one(name):
    full, delta = both(Between(BY_CHOICE[name]).double(), torch.randn(3, 4).double(), torch.arange(3))
    coords = np.arange(full.index.size)
    assert relative(delta.differences(coords, 0.5), full.differences(coords, 0.5)) < 1e-12


class MovedChannels(nn.Module):
    """Two branches of one-channel changes, the channels of one moved by padding."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        y = self.stem(x)
        moved = F.pad(y, (0, 0, 0, 0, 1, 1))
        return self.fc(self.body(torch.cat([F.relu(y), torch.tanh(moved)], 1)).mean((2, 3)))


def test_one_channel_changes_of_branches_keep_their_own_channels():
    full, delta = both(MovedChannels().double(), torch.randn(2, 2, 4, 4).double(), torch.arange(2))
    coords = np.arange(full.index.size)
    assert relative(delta.differences(coords, 1e-2), full.differences(coords, 1e-2)) < 1e-10


class TwoAxes(nn.Module):
    """As many tokens as features: changes of one token and changes of one feature have the same shape."""

    def __init__(self):
        super().__init__()
        self.features, self.tokens, self.fc = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(16, 3)

    def forward(self, x):
        x = (self.tokens(x) + self.features(x))[:, :, :]
        return self.fc((2.0 * torch.tanh(x)).flatten(1))


def test_one_channel_changes_of_the_same_shape_keep_their_own_axes():
    full, delta = both(TwoAxes().double(), torch.randn(3, 4, 4).double(), torch.arange(3))
    coords = np.arange(full.index.size)
    assert relative(delta.differences(coords, 1e-2), full.differences(coords, 1e-2)) < 1e-10


class Biased(nn.Module):
    """Attention with a bias that is learned, beside a parameter without elements."""

    def __init__(self):
        super().__init__()
        self.bias, self.qkv, self.none = nn.Parameter(torch.randn(1, 4)), nn.Linear(3, 9), nn.Parameter(torch.zeros(3, 0))

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.expand(4, 4))
        return torch.cat([attended.mean(1), x[:, 0] @ self.none], 1)


def hooked(k):
    """A network with a hook on its k-th layer."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    net[k].register_forward_hook(lambda module, inputs, output: 2 * output)
    return net


ODD = {
    "hook on a layer": lambda: (hooked(0), (3, 4)),
    "hook on an activation": lambda: (hooked(1), (3, 4)),
    "nothing passes": lambda: (nn.Sequential(nn.Linear(4, 4), nn.Dropout(1.0), nn.Linear(4, 3)), (3, 4)),
    "weight norm": lambda: (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()), (3, 4)),
    "one image without a batch axis": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(0, 1), nn.Conv2d(3, 3, 1), nn.Flatten(0), nn.Unflatten(0, (1, -1))),
        (1, 2, 3, 4),
    ),
    "a bias of attention": lambda: (Biased(), (3, 4, 3)),
    "saturated": lambda: (nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 3)), (3, 4)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_layers_are_exact_too(name):
    model, shape = ODD[name]()
    full, delta = both(
        model.double(), (50.0 if name == "saturated" else 1.0) * torch.randn(shape).double(), torch.arange(shape[0])
    )
    coords = np.arange(full.index.size)
    for mu in (1e-3, 0.1, 10.0):
        expected = full.differences(coords, mu)
        assert torch.isfinite(expected).all()
        assert (delta.differences(coords, mu) - expected).norm() <= 1e-10 * expected.norm()


class Pixels(nn.Module):
    """Takes whole numbers, or 16-bit ones, and scales them by itself."""

    def __init__(self):
        super().__init__()
        self.gain, self.fc, self.last = nn.Parameter(torch.rand(6) / 255), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.fc(x * self.gain).relu())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16])
def test_outputs_are_not_rounded_to_the_type_of_the_inputs(dtype):
    model, inputs, targets = Pixels(), torch.randint(0, 255, (20, 6)).to(dtype), torch.arange(20) % 3
    delta = dzhpc.make_engine("delta", model, "cross_entropy", queries=0.0)
    full = dzhpc.make_engine("full", copy.deepcopy(model).double(), "cross_entropy")
    assert delta.bind(inputs, targets) == pytest.approx(full.bind(inputs.double(), targets), rel=1e-6)
    coords = np.arange(full.index.size)
    truth = full.differences(coords, 1e-3)
    assert float((delta.differences(coords, 1e-3) - truth).norm()) < 1e-3 * float(truth.norm())


def test_probabilities_below_the_smallest_number_count_where_their_change_is_large():
    model = nn.Linear(1, 3, bias=False)
    model.weight.data = torch.tensor([[0.0], [-200.0], [-150.0]])
    inputs, targets = torch.ones(2, 1), torch.tensor([0, 1])
    full, delta = both(model, inputs, targets)
    assert torch.allclose(delta.differences([0, 1, 2], 300.0), full.differences([0, 1, 2], 300.0), rtol=1e-5)
    full, delta = both(nn.Sequential(model, nn.Softmax(1)), inputs, torch.randn(2, 3), "mse")
    assert torch.allclose(delta.differences([0, 1, 2], 300.0), full.differences([0, 1, 2], 300.0), rtol=1e-4)


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
    engine = dzhpc.make_engine("delta", model, "cross_entropy", memory_mb=1e-4)
    engine.bind(inputs, labels)
    with pytest.raises(InputError, match=r"zo\.memory_mb = 0\.0001: one coordinate of features.0.weight needs"):
        engine.differences([0], 1e-3)


MEMORY = """
import sys, torch
import dzhpc
from dzhpc.job.device import PeakMemory
from dzhpc.models.cnn import SimpleCNN
torch.set_num_threads(1)
batch, limit = int(sys.argv[1]), float(sys.argv[2])
model = SimpleCNN(2).to(memory_format=torch.channels_last)
inputs, labels = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.arange(batch) % 10
engine = dzhpc.make_engine("delta", model, "cross_entropy", memory_mb=limit, queries=float(sys.argv[3]))
starts, ends = engine.index.offsets[:-1], engine.index.offsets[1:]
coords = [c for a, b in zip(starts, ends) for c in range(a, min(b, a + 64))]  # no chunk is larger
engine.bind(inputs[:8], labels[:8])
engine.differences(coords[:2], 1e-3)  # what the compiler needs once is not the engine's
engine.bind(inputs, labels)
engine.differences(coords, 1e-3)
with PeakMemory(engine.index.device) as memory:  # what was derived from base values is there already
    engine.differences(coords, 1e-3)
print(memory.bytes)
"""


def test_a_chunk_holds_only_changes_that_are_read_again(monkeypatch):
    held, advance = [], Propagation.advance

    def noted(self, run, changes):
        advance(self, run, changes)
        held.append(sum(c.data.numel() * c.data.element_size() for c in changes.values() if isinstance(c, Change)))

    monkeypatch.setattr(Propagation, "advance", noted)
    model = resnet20()
    inputs, labels, coords = problem(model)
    engine = dzhpc.make_engine("delta", model, "cross_entropy", memory_mb=1.5)
    engine.bind(inputs, labels)
    for owner in np.unique(engine.index.owner(coords))[:-2:4]:  # the last two, of the output's own layer, need no run
        held.clear()
        engine.differences(engine.index.offsets[owner : owner + 1], 1e-3)
        assert 0 < max(held) <= 2**20


def test_changes_are_freed_at_once_and_not_when_cycles_are_collected():
    model = SimpleCNN(2)
    inputs, labels, coords = problem(model)
    engine = dzhpc.make_engine("delta", model, "cross_entropy")
    engine.bind(inputs, labels)
    engine.differences(coords, 1e-3)
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        engine.differences(coords, 1e-3)
        gc.collect()
        assert not [thing for thing in gc.garbage if isinstance(thing, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


@pytest.mark.long
@pytest.mark.parametrize(("limit", "queries"), [(6, "inf"), (40, "0")], ids=["compiled", "uncompiled"])
def test_the_memory_of_a_gradient_stays_within_its_budget(limit, queries):
    command = [sys.executable, "-c", MEMORY, "32", str(limit), queries]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert int(found.stdout) <= limit * 2**20


def test_batches_of_several_sizes_take_turns():
    model = SimpleCNN(1, width=6).to(memory_format=torch.channels_last)
    engine = dzhpc.make_engine("delta", model, "cross_entropy")
    coords = np.arange(0, engine.index.size, 5)
    for size in (64, 6, 64, 33):
        inputs, labels = torch.randn(size, 3, 16, 16), torch.randint(0, 10, (size,))
        truth = dzhpc.make_engine("full", copy.deepcopy(model).double(), "cross_entropy")
        for e, x in ((truth, inputs.double()), (engine, inputs)):
            e.bind(x, labels)
        assert relative(engine.differences(coords, 1e-3), truth.differences(coords, 1e-3)) < 1e-4


def test_peak_bytes_are_base_values_and_what_was_derived_from_them():
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    engine = dzhpc.make_engine("delta", model, "mse")
    assert engine.peak_bytes == 0
    for _ in range(2):
        engine.bind(torch.randn(6, 4).double(), torch.randn(6, 3).double())
        base = 8 * 6 * (4 + 3)
        assert engine.peak_bytes == base
        for _ in range(2):
            engine.differences(np.arange(12), 1e-3)
            assert engine.peak_bytes == base + 8 * 6 * 4  # the input again, its features first


def test_chunks_follow_the_shape_bound_last_whether_it_is_bound_or_not():
    model, coords = SimpleCNN(2, width=6), np.arange(100, 300)
    engine = dzhpc.make_engine("delta", model, "cross_entropy", memory_mb=1)
    with pytest.raises(InputError, match="no batch is bound"):
        engine.cut(coords)
    with pytest.raises(InputError, match="no batch is bound"):
        engine.explain()
    found = {}
    for size in (2, 32):
        engine.bind(torch.randn(size, 3, 16, 16), torch.arange(size) % 10)
        buffers = [b.clone() for b in model.buffers()]
        model.eval()  # as an evaluation leaves it
        engine.unbind()
        found[size] = engine.cut(coords)
        assert not any(m.training for m in model.modules())
        assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
        model.train()
        engine.bind(torch.randn(size, 3, 16, 16), torch.arange(size) % 10)
        assert engine.cut(coords) == found[size]
    assert len(found[32][0]) < len(found[2][0]) <= 64


def test_a_new_shape_costs_no_second_look_at_the_graph_and_a_size_only_when_it_is_asked_for(monkeypatch):
    called = []
    for name in ("seed", "try_out"):
        monkeypatch.setattr(Propagation, name, _noting(called, name, getattr(Propagation, name)))
    model = SimpleCNN(2, width=6)
    engine = dzhpc.make_engine("delta", model, "cross_entropy")
    engine.bind(torch.randn(4, 3, 16, 16), torch.arange(4))
    assert called == ["seed"] * len(engine.index.names)
    routes = engine.routes
    called.clear()
    engine.bind(torch.randn(5, 3, 16, 16), torch.arange(5))
    engine.directional([torch.ones(engine.index.size)], 1e-3)
    assert called == []
    assert engine.routes is routes
    engine.cut(np.arange(3))
    assert 0 < called.count("try_out") <= len(engine.index.names)
    called.clear()
    engine.cut(np.arange(engine.index.size))
    assert called == []


def _noting(called, name, function):
    def noted(*args):
        called.append(name)
        return function(*args)

    return noted


class Shifted(nn.Module):
    """Biases in front of a BatchNorm; one of the layers is read elsewhere too where it is ``shared``."""

    def __init__(self, shared):
        super().__init__()
        self.conv, self.norm, self.fc, self.tokens = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.last, self.shared = nn.Linear(6, 3), shared

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y).relu() + (y.tanh() if self.shared else 0)
        return self.last(self.tokens(self.fc(z.mean((2, 3)))).tanh())


@pytest.mark.parametrize("loss", ["cross_entropy", lambda z, t: z.square().mean()], ids=["cross entropy", "own loss"])
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_bias_in_front_of_a_batch_norm_changes_nothing_at_all(train, shared, loss):
    model = Shifted(shared).double().train(train)
    full, delta = both(model, torch.randn(5, 3, 6, 6).double(), torch.arange(5) % 3, loss)
    coords = np.arange(delta.index.size)
    found, right = delta.differences(coords, 1e-2), full.differences(coords, 1e-2)
    assert relative(found, right) < 1e-8
    assert relative(delta.responses(coords, 1e-2), full.responses(coords, 1e-2)) < 1e-8
    assert delta.queries == full.queries == 1 + 2 * len(coords)
    said = {line.split()[0] for line in delta.explain().splitlines() if "takes its changes away" in line}
    for name, gone in (("conv.bias", train and not shared), ("fc.bias", train), ("norm.bias", False)):
        assert (found[delta.index.range(name)] == 0).all() == (name in said) == gone


def test_explain_says_for_each_parameter_what_is_done_or_why_it_is_not():
    model = Between(lambda y: y * (y > 0))
    model.idle = nn.Linear(2, 2)
    engine = dzhpc.make_engine("delta", model.double(), "cross_entropy")
    engine.bind(torch.randn(3, 4).double(), torch.arange(3))
    head, chunk, *lines = engine.explain().splitlines()
    assert chunk == "changes of a chunk: at most 64 MiB (on a CPU), and 64 coordinates"
    assert head == "engine delta, compiled: False, kernels: none"
    assert lines[0] == (
        "first.weight [5, 4]: one coordinate at a time, since gt gives integers or truth values; first gt mul last"
    )
    assert lines[2] == "last.weight [3, 5]: 15 coordinates a chunk, 0 runs, 0 of them merged; last"
    assert lines[4] == "idle.weight [2, 2]: the output does not depend on it"
    assert len(lines) == len(engine.index.names)
