"""Altered backward passes: equal to back-propagation where theory says so, to closed forms where there are some."""

import copy

import pytest
import torch
from nets import Custom, images
from torch import nn
from torch.func import functional_call, jvp

import dzhpc
from dzhpc.config import Zo
from dzhpc.errors import InputError
from dzhpc.method.estimators import make_estimator
from dzhpc.method.feedback import aligned, direct_feedback, feedback_alignment, linearised
from dzhpc.method.following import layers_of
from dzhpc.models.cnn import SimpleCNN
from dzhpc.models.resnet import resnet20
from dzhpc.models.rivals import CNN8, LeNet
from dzhpc.models.vit import ViT

NETWORKS = {
    "cnn8": lambda: CNN8(4, 8),
    "cnn": lambda: SimpleCNN(2, 4),
    "resnet20": resnet20,
    "lenet": lambda: LeNet(image_size=16),
    "vit": lambda: ViT(2, 8, 2, 4, 8),
    "own layers": lambda: Custom(),
}


def problem(name):
    """(network in float64 and train mode, its inputs, engine with them bound)."""
    torch.manual_seed(3)
    model = NETWORKS[name]().double().train()
    size = 16 if name in ("lenet", "resnet20") else 8
    inputs = torch.randn(6, 4).double() if name == "own layers" else images(size, 6)[0].double()
    outputs = 4 if name == "own layers" else 10
    engine = dzhpc.make_engine("full", model, "mse")
    engine.bind(inputs, torch.randn(6, outputs).double())
    return model, inputs, engine


def moved(model):
    """Other weights, the old ones are what is returned."""
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return start


def assert_equal(engine, through, rtol=1e-12):
    exact, found = engine.gradient(), engine.gradient(through)
    scale = max(float(a.abs().max()) for a in exact)
    for key, a, b in zip(engine.index.names, exact, found, strict=True):
        torch.testing.assert_close(b, a, rtol=rtol, atol=rtol * scale, msg=lambda text, key=key: f"{key}: {text}")


def drawn(model):
    return {key: torch.randn_like(p) if p.ndim > 1 else p.detach() for key, p in model.named_parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_feedback_by_the_weights_themselves_is_back_propagation(name):
    model, inputs, engine = problem(name)
    assert_equal(engine, lambda x: feedback_alignment(model, x, dict(model.named_parameters())))
    found = feedback_alignment(model, inputs, drawn(model))
    before = copy.deepcopy(model)(inputs)
    assert torch.equal(found, before)  # the forward pass is the model's, whatever B


def test_the_last_layer_has_its_exact_gradient_whatever_the_feedback():
    model, _, engine = problem("cnn8")
    exact, found = engine.gradient(), engine.gradient(lambda x: feedback_alignment(model, x, drawn(model)))
    equal = [torch.allclose(a, b, rtol=1e-10, atol=0) for a, b in zip(exact, found, strict=True)]
    assert equal[-2:] == [True, True] and not any(equal[:-2:2])  # convolutions' biases are without effect: rounding


def linear(n=6, hidden=5, out=3, batch=40):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, hidden, bias=False), nn.Linear(hidden, out, bias=False)).double()
    x = torch.randn(batch, n).double()
    engine = dzhpc.make_engine("full", model, "mse")
    return model, x, x @ torch.randn(n, out).double(), engine


def test_a_linear_net_has_the_closed_form_and_its_weights_align():
    model, x, y, engine = linear()
    torch.manual_seed(4)
    B = {"0.weight": torch.zeros(5, 6).double(), "1.weight": torch.randn(3, 5).double()}
    engine.bind(x, y)
    e = 2 * (model(x) - y) / y.numel()
    found = engine.gradient(lambda z: feedback_alignment(model, z, B))
    torch.testing.assert_close(found[0], (e @ B["1.weight"]).t() @ x)
    first = engine.base
    for _ in range(1000):
        for p, g in zip(model.parameters(), engine.gradient(lambda z: feedback_alignment(model, z, B)), strict=True):
            p.data -= 0.2 * g
        last = engine.bind(x, y)
    assert last < 0.01 * first
    w = model[1].weight.detach()
    assert (torch.cosine_similarity(e @ B["1.weight"], e @ w) > 0).double().mean() > 0.9


def test_direct_feedback_is_the_closed_form_and_with_one_hidden_layer_that_of_feedback_alignment():
    model, x, y, engine = linear()
    engine.bind(x, y)
    e, B = 2 * (model(x) - y) / y.numel(), torch.randn(5, 3).double()
    found = engine.gradient(lambda z: direct_feedback(model, z, lambda *_: B))
    torch.testing.assert_close(found[0], (e @ B.t()).t() @ x)
    assert_equal(engine, lambda z: direct_feedback(model, z, lambda *_: model[1].weight.detach().t()))
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
    other = dzhpc.make_engine("full", net, "mse")
    other.bind(x, y)
    by_layer = other.gradient(lambda z: feedback_alignment(net, z, {**dict(net.named_parameters()), "3.weight": B.t()}))
    for a, b in zip(by_layer, other.gradient(lambda z: direct_feedback(net, z, lambda *_: B)), strict=True):
        torch.testing.assert_close(a, b)


def test_direct_feedback_learns_from_zero_weights_where_back_propagation_stands_still():
    model, x, y, engine = linear()
    for p in model.parameters():
        p.data.zero_()
    first = engine.bind(x, y)
    assert all(float(g.abs().max()) == 0 for g in engine.gradient())
    B = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double()
    for _ in range(1000):
        for p, g in zip(model.parameters(), engine.gradient(lambda z: direct_feedback(model, z, lambda *_: B)), strict=True):
            p.data -= 0.2 * g
        last = engine.bind(x, y)
    assert last < 0.01 * first


@pytest.mark.parametrize("name", ["cnn8", "resnet20", "vit"])
def test_direct_feedback_does_not_see_the_layers_above(name):
    """With the error held, a layer's gradient is the same whatever the weights above; in a residual net, too."""
    model, inputs, _ = problem(name)
    matrices = {}

    def fixed(k, size, outputs):
        return matrices.setdefault(k, torch.randn(size, outputs).double())

    error, first = torch.randn(6, 10).double(), next(iter(model.parameters()))
    found = []
    for _ in range(2):
        outputs = direct_feedback(model, inputs, fixed)
        found.append(torch.autograd.grad((outputs * error).sum(), first)[0])
        with torch.no_grad():
            list(model.parameters())[-2].add_(1.0)
    assert float(found[0].abs().max()) > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["cnn8", "cnn", "lenet"])
def test_alignment_with_the_start_is_back_propagation_at_the_start(name):
    model, inputs, engine = problem(name)
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    layers = layers_of(model, inputs, "align-ada")
    assert layers == {"cnn8": 8, "cnn": 3, "lenet": 5}[name]
    assert_equal(engine, lambda x: aligned(model, x, start, layers))
    assert_equal(engine, lambda x: linearised(model, x, start))


def test_alignment_later_is_exact_in_the_last_layer_alone_and_blind_to_the_weights_above():
    model, inputs, engine = problem("cnn8")
    start = moved(model)
    engine.bind(*engine.batch)
    exact = engine.gradient()
    found = engine.gradient(lambda x: aligned(model, x, start, 8))
    equal = [torch.allclose(a, b, rtol=1e-10, atol=0) for a, b in zip(exact, found, strict=True)]
    assert equal[-2:] == [True, True] and not any(equal[:-2:2])
    error = torch.randn(6, 10).double()
    grad = lambda: torch.autograd.grad((aligned(model, inputs, start, 8) * error).sum(), list(model.parameters()))  # noqa: E731
    before = grad()
    with torch.no_grad():
        model.features[15].weight.add_(1.0)  # the fourth convolution
    after = grad()
    for k in (0, 2, 4):  # the first three
        torch.testing.assert_close(after[k], before[k], rtol=1e-12, atol=0)
    assert not torch.allclose(after[8], before[8])


def test_align_ada_on_a_chain_is_what_the_equations_say():
    """Two hidden layers of tanh, by hand."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, e = torch.randn(7, 4).double(), torch.randn(7, 3).double()
    start = moved(model)
    W = {int(key[0]): (w, start[f"{key[0]}.bias"]) for key, w in start.items() if key.endswith("weight")}
    z1, h1 = model[0](x), model[:2](x)
    z2, h2 = model[:3](x), model[:4](x)
    d1 = lambda z: 1 - z.tanh() ** 2  # noqa: E731
    a1 = x @ W[0][0].t() + W[0][1]
    a2 = a1.tanh() @ W[2][0].t() + W[2][1]
    g = e @ W[4][0]
    delta2, below = d1(z2) * g, d1(a2) * g
    delta1 = d1(a1) * (below @ W[2][0])
    found = torch.autograd.grad((aligned(model, x, start, 3) * e).sum(), list(model.parameters()))
    for got, want in zip(found[::2], (delta1.t() @ x, delta2.t() @ h1, e.t() @ h2), strict=True):
        torch.testing.assert_close(got, want)
    del z1


def test_align_zero_is_the_gradient_of_the_taylor_model_with_the_error_of_now():
    model, inputs, engine = problem("cnn8")
    start = moved(model)
    engine.bind(*engine.batch)
    found = engine.gradient(lambda x: linearised(model, x, start))
    u = {key: torch.randn_like(p) for key, p in start.items()}
    _, slope = jvp(lambda p: functional_call(model, p, (inputs,)), (start,), (u,))
    outputs = model(inputs)
    error = 2 * (outputs - engine.batch[1]) / outputs.numel()
    want = float((slope * error).sum())
    assert sum(float((g * u[key]).sum()) for key, g in zip(engine.index.names, found, strict=True)) == pytest.approx(
        want, rel=1e-9
    )


@pytest.mark.parametrize("kind", ["fa", "dfa", "align-ada", "align-zero"])
def test_an_estimator_follows_from_the_seed_and_its_state(kind):
    def gradient(seed, state=None):
        model, _, engine = problem("cnn8")
        estimator = make_estimator(Zo(estimator=kind), seed)
        estimator.check(engine)
        estimator.begin(engine)
        kept = {key: value.clone() for key, value in (state or estimator.state()).items()}
        moved(model)
        if state:
            estimator.begin(engine)  # at other weights, and then put back
            estimator.restore(state)
        engine.bind(*engine.batch)
        return estimator.combine(engine, torch.arange(engine.index.size).numpy(), 0, None), kept

    first, state = gradient(0)
    again, _ = gradient(0, state)
    other, _ = gradient(1)
    assert torch.equal(first, again)
    assert torch.equal(first, other) == kind.startswith("align")  # random feedback follows from the seed
    assert set(state) >= {"fc.weight"} if kind != "dfa" else not state


def test_what_cannot_be_followed_is_one_line():
    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    class Gated(Scripted):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            return self.b((self.a * x[:, :, None]).sum(1))

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.a(x[:, None], x[:, None], x[:, None])[0][:, 0]

    x = torch.randn(5, 4)
    with pytest.raises(InputError, match="cannot follow how the network makes"):
        feedback_alignment(Scripted(), x, dict(Scripted().named_parameters()))
    with pytest.raises(InputError, match='"fa": mul is no layer that it knows'):
        feedback_alignment(gated := Gated(), x, dict(gated.named_parameters()))
    with pytest.raises(InputError, match='"dfa": multi_head_attention_forward is no layer'):
        direct_feedback(Attention(), x, lambda k, n, m: torch.zeros(n, m))
    model, inputs, _ = problem("resnet20")
    with pytest.raises(InputError, match='"align-ada": takes a chain of layers; add joins two branches'):
        aligned(model, inputs, dict(model.named_parameters()), 20)
