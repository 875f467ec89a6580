"""Engines: the differences are right to the bit, everything is put back, and a partial pass costs what it should."""

import copy
import inspect
import time

import pytest
import torch
import torch.nn.functional as F
from nets import (
    HARD,
    AssignsBuffer,
    ControlFlow,
    Dropout,
    Noise,
    OwnInput,
    RunningMean,
    SetItem,
    Unused,
    View,
    assert_same,
    by_copies,
    images,
    snapshot,
    tanh_net,
    vectors,
)
from torch import nn

import dzhpc
from dzhpc.engines.network import NetworkEngine
from dzhpc.engines.protocol import Engine, WhiteBox
from dzhpc.engines.tracing import trace
from dzhpc.errors import InputError
from dzhpc.method import scores as pruning
from dzhpc.models.cnn import SimpleCNN
from dzhpc.tasks.objective import ObjectiveEngine
from dzhpc.tasks.sol.unrolled import UnrolledDelta

KINDS = ("full", "reuse")


def bound(kind, model, batch, loss="mse"):
    engine = dzhpc.make_engine(kind, model, loss)
    engine.bind(*batch)
    return engine


def serial(n, evaluate):
    return evaluate(range(n))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HARD)
def test_differences_equal_those_of_perturbed_copies_bit_for_bit(name, kind):
    model, (inputs, targets), loss, n = HARD[name]()
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    coords = torch.arange(size) if n is None else torch.randint(0, size, (n,))
    expected = by_copies(model, loss, inputs, targets, coords, 0.01)
    engine = bound(kind, model, (inputs, targets), loss)
    assert torch.equal(engine.differences(coords, 0.01), expected)
    assert (expected != 0).float().mean() > 0.3


@pytest.mark.parametrize("name", HARD)
def test_reuse_takes_directions_to_the_bits_of_full(name):
    model, batch, loss, _ = HARD[name]()
    engines = [bound(kind, copy.deepcopy(model), batch, loss) for kind in KINDS]
    directions = torch.randn(3, engines[0].index.size, dtype=engines[0].index.dtype)
    full, reuse = (engine.directional(directions, 0.01) for engine in engines)
    assert torch.equal(full, reuse)
    assert (full != 0).all()


def test_a_direction_runs_nothing_before_the_first_trained_layer():
    model, batch = tanh_net(4, 5, 5, 4), vectors()
    model[:3].requires_grad_(False)
    passes = []
    model[0].register_forward_hook(lambda *_: passes.append("frozen"))
    model[4].register_forward_hook(lambda *_: passes.append("trained"))
    engines = [bound(kind, model, batch) for kind in KINDS]
    directions = torch.randn(3, engines[0].index.size, dtype=torch.float64)
    passes.clear()
    reuse = engines[1].directional(directions, 0.01)
    assert passes == ["trained"] * 3
    assert torch.equal(engines[0].directional(directions, 0.01), reuse)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unused_parameter_has_difference_exactly_zero(kind):
    engine = bound(kind, Unused().double(), vectors())
    idle = [j for name in ("idle.weight", "idle.bias", "never") for j in engine.index.range(name)]
    assert torch.equal(engine.differences(idle, 0.1), torch.zeros(26, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_coordinates_may_repeat_in_any_order_and_mu_may_be_negative(kind):
    model, batch = tanh_net(4, 5, 4), vectors()
    engine = bound(kind, model, batch)
    coords = torch.tensor([40, 0, 7, 7, 48, 0])
    assert torch.equal(engine.differences(coords, -0.02), by_copies(model, "mse", *batch, coords, -0.02))
    assert torch.equal(engine.differences(coords, 0.02), engine.differences(coords.flip(0), 0.02).flip(0))


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "full"), (torch.float64, "reuse")])
def test_no_coordinates_give_an_empty_vector_of_the_parameters_dtype(dtype, kind):
    engine = bound(kind, nn.Linear(4, 4).to(dtype), vectors(dtype))
    assert engine.differences([], 0.1).shape == engine.directional([], 0.1).shape == (0,)
    assert engine.differences([], 0.1).dtype == engine.differences([1], 0.1).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coord", [-1, 49])
def test_a_coordinate_out_of_range_is_refused_before_any_query(kind, coord):
    engine = bound(kind, tanh_net(4, 5, 4), vectors())
    assert engine.index.size == 49
    with pytest.raises(InputError, match=r"outside 0\.\.48"):
        engine.differences([0, coord], 0.1)
    assert engine.queries == 1


@pytest.mark.parametrize("kind", KINDS)
def test_queries_are_one_a_coordinate_or_direction_and_one_a_bind(kind):
    model, batch = Unused().double(), vectors()
    engine = bound(kind, model, batch)
    assert engine.queries == 1
    dzhpc.cge(engine, range(46), 0.1)  # the unused ones count, too
    assert engine.queries == 1 + 46
    dzhpc.cge(engine, [3, 3], 0.1, difference="central")
    assert engine.queries == 47 + 4
    dzhpc.rge(engine, 7, 0.1, seed=0)
    assert engine.queries == 51 + 7
    dzhpc.autograd(engine)
    engine.bind(*batch)
    assert engine.queries == 58 + 1


@pytest.mark.parametrize("call", [lambda e: e.differences([0], 0.1), lambda e: e.directional([], 0.1), lambda e: e.gradient()])
def test_nothing_is_evaluated_before_a_batch_is_bound(call):
    with pytest.raises(InputError, match="no batch is bound"):
        call(dzhpc.make_engine("full", nn.Linear(4, 4), "mse"))


def batch_norm_net():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4)).double()


ESTIMATES = {
    "cge": lambda e: dzhpc.cge(e, range(20), 0.01),
    "cge central": lambda e: dzhpc.cge(e, range(20), 0.01, "central"),
    "rge": lambda e: dzhpc.rge(e, 5, 0.01, 3),
    "rge central": lambda e: dzhpc.rge(e, 5, 0.01, 3, "central"),
    "autograd": dzhpc.autograd,
}


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize(
    ("kind", "make"), [("full", batch_norm_net), ("full", lambda: Dropout().double()), ("reuse", batch_norm_net)]
)
def test_an_estimate_leaves_parameters_buffers_modes_gradients_and_random_numbers_as_they_were(kind, make, estimate):
    model = make()
    model[3].eval() if isinstance(model, nn.Sequential) else model.a.eval()  # a mixture of modes
    engine = bound(kind, model, vectors())
    before = snapshot(model)
    ESTIMATES[estimate](engine)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("kind", KINDS)
def test_zo_grasp_leaves_parameters_modes_and_buffers_as_they_were(kind):
    model, batch = batch_norm_net().eval(), vectors()
    engine = dzhpc.make_engine(kind, model, "mse")
    before = snapshot(model)
    pruning.zo_grasp(engine, lambda: engine.bind(*batch), 4, 0.01, 0, serial)
    assert_same(before, snapshot(model))


class Fragile:
    """Mean squared error that fails in one of its evaluations."""

    def __init__(self):
        self.left = -1

    def __call__(self, outputs, targets):
        self.left -= 1
        if self.left == 0:
            raise ZeroDivisionError
        return F.mse_loss(outputs, targets)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_a_loss_that_raises_in_the_middle_leaves_everything_as_it_was(kind, estimate):
    model, loss = batch_norm_net(), Fragile()
    engine = bound(kind, model, vectors(), loss)
    before = snapshot(model)
    loss.left = 1 if estimate == "autograd" else 4
    with pytest.raises(ZeroDivisionError):
        ESTIMATES[estimate](engine)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("kind", KINDS)
def test_zo_grasp_puts_the_parameters_back_when_the_loss_raises_at_theta_plus_mu_g(kind):
    model, loss, batch = batch_norm_net().eval(), Fragile(), vectors()
    engine = bound(kind, model, batch, loss)
    before = snapshot(model)
    loss.left = 8  # 5 evaluations at theta, then the bind and the second query at theta + mu g
    with pytest.raises(ZeroDivisionError):
        pruning.zo_grasp(engine, lambda: engine.bind(*batch), 4, 0.01, 0, serial)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [lambda: SimpleCNN(2, 4).double(), lambda: RunningMean().double()], ids=["BatchNorm", "own"])
def test_running_statistics_move_exactly_once_a_bind(kind, make):
    model = make()
    plain = copy.deepcopy(model)
    loss = "cross_entropy" if isinstance(model, SimpleCNN) else "mse"
    engine = dzhpc.make_engine(kind, model, loss)
    for _ in range(2):
        inputs, targets = vectors() if loss == "mse" else [t.double() if t.is_floating_point() else t for t in images(8)]
        engine.bind(inputs, targets)
        for estimate in ESTIMATES.values():
            estimate(engine)
        plain(inputs)
        assert [torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True)] == [True] * len(
            list(plain.buffers())
        )


@pytest.mark.parametrize("kind", ["reuse", "delta"])
def test_dropout_is_refused_by_name_in_train_mode_and_exact_in_eval_mode(kind):
    model, batch = Dropout().double(), vectors()
    engine, before = dzhpc.make_engine(kind, model, "mse"), snapshot(model)
    with pytest.raises(InputError, match=rf'random numbers in drop \(dropout\?\).*engine "{kind}".*use engine = "full"'):
        engine.bind(*batch)
    assert_same(before, snapshot(model))
    engine.model.eval()
    engine.bind(*batch)
    expected = by_copies(model, "mse", *batch, range(76), 0.1)
    assert torch.allclose(engine.differences(range(76), 0.1), expected, rtol=0 if kind == "reuse" else 1e-9, atol=0)


def test_random_numbers_that_a_trace_would_freeze_are_refused():
    with pytest.raises(InputError, match=r'Noise draws random numbers.*engine = "full"'):
        bound("reuse", Noise().double(), vectors())


@pytest.mark.parametrize("net", [Dropout, Noise])
def test_full_uses_common_random_numbers(net):
    model, batch = net().double(), vectors()
    engine = bound("full", model, batch)
    torch.rand(5)  # whatever else draws
    first = engine.differences(range(20), 0.1)
    assert torch.equal(first, engine.differences(range(20), 0.1))
    assert torch.equal(engine.differences([0, 1], 0.0), torch.zeros(2, dtype=torch.float64))
    base = engine.bind(*batch)
    assert base != engine.bind(*batch)  # another step, other random numbers


class Attributes(nn.Module):
    """A number, a tensor and a buffer that others may set; it counts its passes."""

    def __init__(self):
        super().__init__()
        self.fc, self.heat, self.mask, self.passes = nn.Linear(3, 4).double(), 1.0, torch.ones(4).double(), 0
        self.register_buffer("gain", torch.ones(4).double())

    def forward(self, x):
        self.passes += 1
        return torch.tanh(self.fc(x) * self.heat * self.mask) * self.gain


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, torch.ones(5, 3).double())])
def test_a_scripted_network_is_refused_and_left_as_it_was(make):
    model, batch = make(nn.Linear(3, 2).double()), (torch.randn(5, 3).double(), torch.arange(5) % 2)
    for kind in ("reuse", "delta"):
        with pytest.raises(InputError, match=r'cannot trace .*, a scripted module; use engine = "full"'):
            dzhpc.make_engine(kind, model, "cross_entropy").bind(*batch)
    assert dzhpc.make_engine("full", model, "cross_entropy").bind(*batch) > 0


@pytest.mark.parametrize("kind", ["reuse", "delta"])
def test_attributes_that_somebody_sets_between_two_batches_are_seen(kind, monkeypatch):
    model, (inputs, targets), traces = Attributes(), (torch.randn(5, 3).double(), torch.arange(5) % 4), []
    monkeypatch.setattr("dzhpc.engines.traced.trace", lambda *args: traces.append(1) or trace(*args))
    engine = dzhpc.make_engine(kind, model, "cross_entropy")
    for name, value in (("heat", 2.0), ("mask", torch.tensor([1.0, 0, 3, 1]).double()), ("gain", torch.rand(4).double())):
        engine.bind(inputs, targets), engine.bind(inputs, targets)
        setattr(model, name, value)
        engine.bind(inputs, targets)
        expected = by_copies(model, "cross_entropy", inputs, targets, range(16), 1e-2)
        torch.testing.assert_close(engine.differences(range(16), 1e-2), expected, rtol=1e-9, atol=1e-14)
    assert len(traces) == 4


def test_switching_between_train_and_eval_mode_traces_anew():
    model, batch = RunningMean().double(), vectors()
    engine = bound("reuse", model, batch)
    for mode in (False, True):
        model.train(mode)
        expected = by_copies(model, "mse", *batch, range(40), 0.1)
        engine.bind(*batch)
        assert torch.equal(engine.differences(range(40), 0.1), expected)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (SetItem, 'engine "KIND": torch.fx cannot trace SetItem .*item assignment.*use engine = "full"'),
        (AssignsBuffer, 'AssignsBuffer assigns its buffer count .*engine "KIND".*use engine = "full"'),
        (View, 'engine "KIND": the trace of View does not reproduce it; use engine = "full"'),
        (ControlFlow, 'engine "KIND": torch.fx cannot trace ControlFlow .*if h.sum.*nets.py line .*use engine = "full"'),
    ],
)
def test_what_a_trace_cannot_follow_is_refused_by_name_and_full_takes_it(net, message):
    model, batch = net().double(), vectors()
    for kind in ("reuse", "delta"):
        with pytest.raises(InputError, match=message.replace("KIND", kind)):
            bound(kind, model, batch)
    expected = by_copies(model, "mse", *batch, range(40), 0.1)
    assert torch.equal(bound("full", model, batch).differences(range(40), 0.1), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_overwrites_its_input_is_evaluated_right_or_refused(kind):
    model, (inputs, targets) = OwnInput().double(), vectors()
    expected = by_copies(model, "mse", inputs, targets, range(40), 0.1)
    try:
        engine = bound(kind, model, (inputs.clone(), targets))
    except InputError as refusal:
        assert "input" in str(refusal)
    else:
        assert torch.equal(engine.differences(range(40), 0.1), expected)


def test_full_takes_a_plain_callable_with_named_parameters():
    w, b, x, y = (torch.randn(s, dtype=torch.float64) for s in ((4, 3), (), (6, 4), (6, 3)))
    engine = dzhpc.make_engine("full", lambda x: torch.tanh(x @ w) + b, "mse", parameters={"w": w, "b": b})
    engine.bind(x, y)
    before, saved = engine.index.names, w.clone()
    loss = lambda w, b: F.mse_loss(torch.tanh(x @ w) + b, y)  # noqa: E731
    shifted = w.clone()
    shifted[1, 2] += 0.1
    expected = torch.stack([loss(shifted, b) - loss(w, b), loss(w, b + 0.1) - loss(w, b)])
    assert before == ["w", "b"]
    assert torch.allclose(engine.differences([5, 12], 0.1), expected, rtol=1e-13)
    assert torch.equal(w, saved)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fulll", nn.Linear(1, 1), "mse"), 'engine = "fulll": expected "full", "reuse" or "delta"'),
        (("full", nn.Linear(1, 1), "nll"), 'loss = "nll": expected "cross_entropy", "mse" or a callable'),
        (("full", nn.Linear(1, 1), "mse", "bf16"), 'precision = "bf16"'),
        (("full", lambda x: x, "mse"), r"needs parameters = \{name: tensor\}"),
        (("reuse", lambda x: x, "mse"), 'engine "reuse" needs a torch.nn.Module'),
        (("reuse", nn.ReLU(), "mse"), "no trainable parameter"),
    ],
)
def test_what_no_engine_can_be_made_of_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        dzhpc.make_engine(*arguments)


def test_reuse_counts_its_kept_features_and_refuses_a_batch_that_needs_more_than_memory_mb():
    model, batch = SimpleCNN(1), images(32, batch=64)
    engine = bound("reuse", model, batch, "cross_entropy")
    inputs, after_conv, pooled, mean = 64 * 3 * 32**2, 64 * 18 * 32**2, 64 * 18 * 16**2, 64 * 18
    assert engine.peak_bytes == 4 * (inputs + after_conv + mean)
    assert engine.peak_bytes < 4 * (inputs + after_conv + pooled + mean)
    engine = dzhpc.make_engine("reuse", model, "cross_entropy", memory_mb=1)
    with pytest.raises(InputError, match=r"zo\.memory_mb = 1: .* need 5 MiB; raise it, use a smaller data\.batch_size"):
        engine.bind(*batch)


def hand_written(model, inputs, targets, coords, mu):
    """A partial pass for SimpleCNN alone, as one would write it by hand: all layer inputs kept, layers k.. run again."""
    layers = [*model.features, lambda h: h.mean((2, 3)), model.fc]
    features = [inputs]
    for layer in layers:
        features.append(layer(features[-1]))
    base = F.cross_entropy(features[-1].double(), targets)
    owners = [(k, p) for k, layer in enumerate(layers) if isinstance(layer, nn.Module) for p in layer.parameters()]
    ends = torch.tensor([p.numel() for _, p in owners]).cumsum(0).tolist()
    values = []
    for j in coords:
        place = next(i for i, end in enumerate(ends) if j < end)
        k, p = owners[place]
        element = p.view(-1)[j - ends[place] + p.numel()]
        saved = element.clone()
        element += mu
        h = features[k]
        for layer in layers[k:]:
            h = layer(h)
        values.append(F.cross_entropy(h.double(), targets) - base)
        element.copy_(saved)
    return torch.stack(values).float()


@torch.no_grad()
def test_reuse_costs_at_most_1_2_times_a_hand_written_partial_pass():
    model, batch = SimpleCNN(3), images(32, batch=64)
    coords = torch.randint(0, 6670, (16,)).tolist()
    engine = bound("reuse", model, batch, "cross_entropy")
    assert torch.equal(engine.differences(coords, 0.01), hand_written(model, *batch, coords, 0.01))

    def seconds(function):
        start = time.process_time()  # what other processes take is no part of it
        function()
        return time.process_time() - start

    def ratio():
        pairs = [
            (
                seconds(lambda: (engine.bind(*batch), engine.differences(coords, 0.01))),
                seconds(lambda: hand_written(model, *batch, coords, 0.01)),
            )
            for _ in range(7)
        ]
        reuse, by_hand = (sorted(times)[len(pairs) // 2] for times in zip(*pairs, strict=True))
        return reuse / by_hand

    ratios = [ratio()]
    while ratios[-1] > 1.2 and len(ratios) < 3:  # the machine may be busy
        ratios.append(ratio())
    assert min(ratios) <= 1.2


def subclasses(kind):
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def test_an_engine_is_abstract_or_final():
    found = subclasses(NetworkEngine)
    assert UnrolledDelta in found and len(found) == 1 + 1 + 3 + 1 + 2
    for kind in found:
        assert inspect.isabstract(kind) == bool(kind.__subclasses__())
        given = {name for base in kind.__mro__[1:] for name, f in vars(base).items() if inspect.isfunction(f)}
        required = {name for base in kind.__mro__[1:] for name in getattr(base, "__abstractmethods__", ())}
        assert set(vars(kind)) & given <= required | {"__init__"}  # nothing that does something is replaced


FINAL = [kind for kind in subclasses(NetworkEngine) | {ObjectiveEngine} if not inspect.isabstract(kind)]


@pytest.mark.parametrize("kind", sorted(FINAL, key=lambda kind: kind.__name__))
def test_engines_have_all_that_the_protocol_asks(kind):
    protocol = Engine if kind is ObjectiveEngine else WhiteBox
    asked = {name for base in protocol.__mro__ for name in vars(base) if not name.startswith("_")}
    set_at_start = {"index", "queries", "at_once", "peak_bytes", "base_bytes"}
    assert {"cut", "explain", "differences"} <= asked
    assert asked - set(dir(kind)) <= set_at_start


@pytest.mark.parametrize("kind", ["full", "reuse"])
def test_chunks_of_single_queries_need_no_batch(kind):
    engine = dzhpc.make_engine(kind, tanh_net(4, 5, 4), "mse")
    assert engine.cut(torch.arange(22).numpy()) == [range(k, min(k + 4, 20)) for k in range(0, 20, 4)] + [range(20, 22)]


def test_explain_says_what_runs_again():
    engine = bound("reuse", Unused().double(), vectors())
    head, *lines = engine.explain().splitlines()
    assert "one coordinate at a time" in head
    assert lines[:2] == ["never: 0 of 4 operations", "fc.weight: 2 of 4 operations"]
    assert "one coordinate at a time" in bound("full", Unused().double(), vectors()).explain()
