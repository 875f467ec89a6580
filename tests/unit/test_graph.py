"""The traced network: what runs again, what is kept, and what stays the user's."""

import pytest
import torch
from nets import InPlace, Unused, vectors
from torch import nn

import dzhpc
from dzhpc.engines.reuse import Tails
from dzhpc.engines.traced import Traced
from dzhpc.errors import InputError
from dzhpc.method.coordinates import ParameterIndex


class Branches(nn.Module):
    """stem -> (left, right) -> head."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        return self.head(torch.tanh(self.left(h)) + torch.tanh(self.right(h)))


@pytest.mark.parametrize(
    ("layer", "downstream"),
    [("stem", ["stem", "left", "right", "head"]), ("left", ["left", "head"]), ("right", ["right", "head"]), ("head", ["head"])],
)
def test_only_what_lies_downstream_of_the_perturbed_parameter_runs_again(layer, downstream):
    model = Branches().double()
    engine = dzhpc.make_engine("reuse", model, "mse")
    engine.bind(*vectors())
    calls = []
    for name, module in model.named_children():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    engine.differences(engine.index.range(f"{layer}.weight")[:1], 0.1)
    assert calls == downstream


def test_a_bind_runs_the_model_once_after_the_first_of_its_mode():
    model = Branches().double()
    engine, calls = dzhpc.make_engine("reuse", model, "mse"), []
    engine.bind(*vectors())
    model.head.register_forward_hook(lambda *_: calls.append(1))
    engine.bind(*vectors())
    assert len(calls) == 1


def test_an_output_that_does_not_depend_on_a_parameter_has_no_tail():
    model = Unused().double()
    index = ParameterIndex.of(model)
    traced = Traced(model, index.parameters)
    tails, other = Tails(traced, len(index.names)), torch.zeros(())
    output = traced.run(vectors()[0], tails.wanted)
    assert [n for k, n in enumerate(index.names) if tails.outputs(k, other) is other] == ["never", "idle.weight", "idle.bias"]
    assert torch.equal(tails.outputs(index.names.index("fc.weight"), other), output)


def test_kept_bytes_count_what_tails_read_and_shared_storage_once():
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2), nn.Linear(2, 4)).double()
    traced = Traced(model, list(model.parameters()))
    traced.run(vectors()[0], Tails(traced, 6).wanted)
    assert traced.kept_bytes == 8 * 6 * (4 + 16 + 2)


def test_the_users_in_place_modules_stay_in_place():
    model = InPlace().double()
    features = model.a(vectors()[0])
    dzhpc.make_engine("reuse", model, "mse").bind(*vectors())
    assert model.act.inplace
    assert model.act(features) is features


@pytest.mark.parametrize(
    ("write", "target"),
    [
        (lambda h: h.copy_(h * 2), "copy_"),
        (lambda h: h.zero_(), "zero_"),
        (lambda h: torch.add(h, 1, out=h), "add"),
    ],
)
def test_an_overwriting_operation_without_another_form_is_refused_by_its_name(write, target):
    class Writes(Branches):
        def forward(self, x):
            h = self.stem(x)
            write(h)
            return self.head(h)

    model = Writes().double()
    with pytest.raises(InputError, match=f'Writes overwrites a tensor by {target} .*use engine = "full"'):
        Traced(model, list(model.parameters()))
    with pytest.raises(InputError, match='engine "delta" cannot undo'):
        dzhpc.make_engine("delta", model, "mse").bind(*vectors())


class Kept(nn.Module):
    """Reads its hidden features from where a hook has put them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.features = nn.Linear(4, 8), nn.Linear(8, 3), {}
        self.a.register_forward_hook(lambda module, inputs, output: self.features.update(last=output))

    def forward(self, x):
        self.a(x)
        return self.b(torch.tanh(self.features["last"]))


@pytest.mark.parametrize("kind", ["reuse", "delta"])
@pytest.mark.parametrize("size", [1, 5])
def test_features_that_a_hook_has_kept_are_no_constants_of_a_trace(kind, size):
    """The network has just seen this very batch, so that a trace that holds its features gives the right loss."""
    model, (x, y) = Kept().double(), (torch.randn(size, 4, dtype=torch.float64), torch.randn(size, 3, dtype=torch.float64))
    model(x)
    with pytest.raises(InputError, match=rf'Kept reads what an earlier pass has left .* engine "{kind}" cannot repeat'):
        dzhpc.make_engine(kind, model, "mse").bind(x, y)
    full = dzhpc.make_engine("full", model, "mse")
    full.bind(x, y)
    assert full.differences([0, 5], 0.1).all()


class Optional(nn.Module):
    """Other arguments than the batch, as networks of libraries have."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x, labels=None, return_dict=False, *rest, **options):
        logits = self.layers(x, *rest)
        if labels is not None or return_dict or options.get("output_attentions"):
            return {"logits": logits}
        return logits


def test_other_arguments_have_their_defaults_and_wrappers_are_looked_through():
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    for wrap in (lambda model: model, nn.DataParallel):
        model, found = wrap(Optional().double()), {}
        kind = type(model)
        for name in ("full", "reuse", "delta"):
            engine = dzhpc.make_engine(name, model, "mse")
            engine.bind(x, y)
            found[name] = engine.differences([0, 33, 66], 0.01)
        assert torch.allclose(found["delta"], found["full"], rtol=1e-9, atol=1e-14) and type(model) is kind
        assert torch.equal(found["reuse"], found["full"]) and found["full"].all()


class Cosines(nn.Module):
    """A cosine classifier; with ``descend``, of features that a step along an energy's gradient has moved."""

    def __init__(self, descend):
        super().__init__()
        self.a, self.w, self.descend = nn.Linear(4, 8), nn.Parameter(torch.randn(3, 8)), descend

    def forward(self, x):
        h = self.a(x)
        if self.descend:
            with torch.enable_grad():
                z = torch.ones(5, 8, dtype=torch.float64, requires_grad=True)
                h = h - torch.autograd.grad((z * h).sum() + (z**4).sum(), z)[0]
        return nn.functional.normalize(h, dim=1) @ nn.functional.normalize(self.w, dim=1).T


@pytest.mark.parametrize("kind", ["reuse", "delta"])
def test_an_argument_out_that_is_none_overwrites_nothing_and_a_trace_that_does_not_run_is_refused(kind):
    x, y, found = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64), []
    torch.manual_seed(0)
    model = Cosines(False).double()
    for name in ("full", kind):
        engine = dzhpc.make_engine(name, model, "mse")
        engine.bind(x, y)
        found.append(engine.differences([0, 35, 50], 0.01))
    assert torch.allclose(*found, rtol=1e-9, atol=1e-14) and found[0].all()
    model.descend = True
    with pytest.raises(InputError, match=r"the trace of Cosines does not run \(element 0 of tensors does not"):
        dzhpc.make_engine(kind, model, "mse").bind(x, y)
