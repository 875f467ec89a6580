"""How user code may call what it is made of: by keyword, as a scripted module; and what it may not give."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import by_copies
from torch import nn

import dzhpc
from dzhpc.errors import InputError


class Net(nn.Module):
    """A convolution, ``middle``, a classifier, called by keyword."""

    def __init__(self, middle):
        super().__init__()
        self.stem, self.inner, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)
        self.norm, self.gelu, self.layer, self.linear = nn.BatchNorm2d(4), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 6)
        self.p, self.w, self.middle = nn.Parameter(torch.randn(4, 1, 1)), nn.Parameter(torch.randn(4, 4, 1, 1)), middle
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.fc(input=torch.tanh(self.middle(self, self.stem(input=x))).mean((2, 3)))


def attention(s, x, **how):
    tokens = x.flatten(2).transpose(1, 2)
    return s.attention(query=tokens, key=tokens, value=tokens, **how)[0].transpose(1, 2).unflatten(2, (6, 6))


BY_KEYWORD = {
    "modules": lambda s, x: s.linear(input=s.layer(input=s.gelu(input=s.norm(input=s.inner(input=x))))),
    "attention": lambda s, x: attention(s, x, need_weights=False),
    "functions": lambda s, x: F.layer_norm(input=F.relu(input=x), normalized_shape=(6,), weight=s.layer.weight),
    "native": lambda s, x: torch.add(input=F.conv2d(input=torch.tanh(input=x), weight=s.w), other=s.p, alpha=2),
    "mixed": lambda s, x: torch.mul(F.linear(x, weight=s.linear.weight, bias=s.linear.bias), other=s.p),
    "methods": lambda s, x: s.p.mul(other=x).add(other=s.p, alpha=3).matmul(other=s.linear.weight),
    "lists": lambda s, x: torch.cat(tensors=[x[:, 2:], x[:, :2]], dim=1),
    "reshaping": lambda s, x: torch.flatten(input=F.max_pool2d(input=F.pad(input=x, pad=(1, 1)), kernel_size=2), start_dim=2)[
        ..., None
    ],
}


def problem(model):
    return model.double(), torch.randn(3, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 3, 4])


def differences(kind, model, x, y, coords, loss="cross_entropy"):
    engine = dzhpc.make_engine(kind, copy.deepcopy(model), loss)
    engine.bind(x, y)
    return engine, engine.differences(coords, 0.01)


@pytest.mark.parametrize("name", BY_KEYWORD)
def test_arguments_by_keyword_are_as_good_as_by_position(name):
    model, x, y = problem(Net(BY_KEYWORD[name]))
    starts = dzhpc.make_engine("full", model, "cross_entropy").index.offsets[:-1]
    coords = sorted({*starts.tolist(), *range(0, 112, 9)})
    expected = by_copies(model, "cross_entropy", x, y, coords, 0.01)
    assert torch.equal(differences("reuse", model, x, y, coords)[1], expected)
    engine, found = differences("delta", model, x, y, coords)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-15)
    if name != "attention":  # whose output is no tensor
        assert [route.refusal for route in engine.routes if route.nodes and route.refusal] == []


def test_hooks_see_the_keywords_of_the_user():
    model, x, y = problem(Net(lambda s, x: s.inner(input=x)))
    model.inner.register_forward_pre_hook(lambda m, args, kwargs: (args, {"input": 2 * kwargs["input"]}), with_kwargs=True)
    expected = by_copies(model, "cross_entropy", x, y, range(0, 112, 9), 0.01)
    for kind in ("reuse", "delta"):
        assert torch.allclose(differences(kind, model, x, y, range(0, 112, 9))[1], expected, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_module_is_an_operation_as_any_other():
    model, x, y = problem(Net(lambda s, x: s.scripted(x)))
    model.scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())).double()
    index = dzhpc.make_engine("full", model, "cross_entropy").index
    coords = [
        *index.range("stem.weight")[:3].tolist(),
        int(index.range("scripted.0.weight")[7]),
        int(index.range("scripted.1.bias")[1]),
    ]
    full = differences("full", model, x, y, coords)[1]
    assert (full != 0).all()
    assert torch.equal(differences("reuse", model, x, y, coords)[1], full)
    assert torch.allclose(differences("delta", model, x, y, coords)[1], full, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_function_is_refused_by_a_line_that_says_why():
    def scale(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    scripted = torch.jit.script(scale)
    model, x, y = problem(Net(lambda s, x: scripted(x)))
    for kind in ("reuse", "delta"):
        with pytest.raises(InputError, match=f'engine "{kind}": torch.fx cannot trace Net .*scale.*use engine = "full"'):
            differences(kind, model, x, y, [0])


@pytest.mark.parametrize("give", [lambda out: {"logits": out}, lambda out: (out, 1.0)])
def test_a_network_that_gives_no_single_tensor_needs_a_loss_of_its_own(give):
    class Gives(Net):
        def forward(self, x):
            return give(super().forward(x))

    def loss(outputs, y):
        return F.cross_entropy(outputs["logits"] if isinstance(outputs, dict) else outputs[0], y)

    model, x, y = problem(Gives(lambda s, x: x))
    expected = by_copies(model, loss, x, y, [0, 50], 0.01)
    for kind in ("full", "reuse", "delta"):
        with pytest.raises(InputError, match=r"the network gives .*(dict|tuple); a loss that has a name takes one tensor"):
            differences(kind, model, x, y, [0])
        assert torch.allclose(differences(kind, model, x, y, [0, 50], loss)[1], expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (lambda m: setattr(m, "inner", nn.LazyConv2d(4, 3)), "inner.weight has no shape yet, being a lazy module's"),
        (lambda m: setattr(m, "w", nn.Parameter(torch.eye(4).to_sparse())), "w is sparse; expected a dense parameter"),
    ],
)
def test_parameters_that_cannot_be_perturbed_are_refused_by_name(parameter, message):
    model = Net(lambda s, x: x)
    parameter(model)
    for kind in ("full", "reuse", "delta"):
        with pytest.raises(InputError, match=message):
            dzhpc.make_engine(kind, model, "cross_entropy")


def test_sparse_and_quantised_buffers_are_state_as_others_are():
    model, x, y = problem(
        Net(lambda s, x: x + torch.sparse.mm(s.sparse, s.w[..., 0, 0]).mean() + s.quantised.dequantize().mean())
    )
    model.register_buffer("sparse", torch.eye(4, dtype=torch.float64).to_sparse())
    model.register_buffer("quantised", torch.quantize_per_tensor(torch.rand(4), 0.1, 0, torch.qint8))
    full = differences("full", model, x, y, range(0, 112, 9))[1]
    assert torch.equal(differences("reuse", model, x, y, range(0, 112, 9))[1], full)
    assert torch.allclose(differences("delta", model, x, y, range(0, 112, 9))[1], full, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_part_that_computes_in_16_bits_is_evaluated_one_coordinate_at_a_time(dtype):
    model = Net(lambda s, x: F.conv2d(x.to(dtype), s.w.to(dtype)).to(x.dtype)).float()
    x, y = torch.randn(3, 3, 6, 6), torch.tensor([0, 3, 4])
    coords = [*range(4, 20), *range(20, 128, 9)]
    full = differences("full", model, x, y, coords)[1]
    engine, found = differences("delta", model, x, y, coords)
    assert torch.equal(found, full) and full.any()
    assert engine.routes[2].refusal.endswith("gives numbers of 16 bits")
