"""Perturbed queries through shared layers: outputs are those of a network whose weight is really moved, or it is refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dzhpc.engines.rankone import repeated, try_out
from dzhpc.errors import InputError
from dzhpc.method.coordinates import ParameterIndex

B, MU = 3, 0.3


class Residual(nn.Module):
    """A way around the first layer: queries cannot part in it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x):
        return self.b(x + torch.tanh(self.a(x)))


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.a(torch.sin(self.a(x)))


class Tied(nn.Module):
    """One tensor in two modules."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, (1, 3), padding=(0, 1)), nn.Conv2d(3, 3, (1, 3), padding=(0, 1), bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(F.gelu(self.a(x)))


class PerPixel(nn.Module):
    """Linear layers over the last axis, once with the samples' pixels as samples of their own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2, bias=False)

    def forward(self, x):
        n, _, h, w = x.shape
        y = torch.tanh(self.a(x.permute(0, 2, 3, 1))).reshape(-1, 5)
        return self.b(y).view(n, h, w, 2).permute(0, 3, 1, 2)


class PartlyFrozen(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
        self[1].requires_grad_(False)
        self[1].eval()


CONVOLUTIONS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "no bias, no padding": {"kernel_size": (2, 3), "bias": False},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 3},
    "dilation": {"kernel_size": 3, "padding": (2, 4), "dilation": (2, 3)},
    "stride": {"kernel_size": (3, 5), "padding": (1, 2), "stride": (2, 3)},
    "same": {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "circular": {"kernel_size": 5, "padding": (1, 2), "padding_mode": "circular"},
    "replicate": {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
}


def convolution(**how):
    return nn.Sequential(nn.Conv2d(3, 6, **how), nn.Tanh(), nn.Conv2d(6, 2, 1))


NETS = {name: (lambda how=how: convolution(**how)) for name, how in CONVOLUTIONS.items()}
NETS |= {net.__name__: net for net in (Residual, Twice, Tied, PerPixel, PartlyFrozen)}


def moved(model, index, coord, inputs):
    """Outputs with one coordinate really moved."""
    _, element = index.element(coord)
    saved = element.clone()
    element += MU
    outputs = model(inputs)
    element.copy_(saved)
    return outputs


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_outputs_are_those_of_a_network_whose_weight_is_moved(name, layout):
    model = NETS[name]().double().to(memory_format=layout)
    x = torch.randn(B, 3, 6, 9, dtype=torch.float64).contiguous(memory_format=layout)
    network, _ = try_out(model, x[:2])
    index, seen = ParameterIndex.of(model), 0
    for owner, parameter in enumerate(index.parameters):
        elements = np.random.default_rng(owner).permutation(parameter.numel())[:7]
        true = torch.cat([moved(model, index, index.offsets[owner] + k, x) for k in elements])
        with network.perturbed(owner, elements, MU):
            own_ways = model(torch.cat([x * (1 + k) for k in range(len(elements))]))  # no longer the same inputs
            same = model(repeated(x, len(elements)))
        for k, j in enumerate(elements):
            apart = moved(model, index, index.offsets[owner] + j, x * (1 + k))
            torch.testing.assert_close(own_ways[k * B : (k + 1) * B], apart, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(same, true, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(network.first(owner, elements, MU, x), true, rtol=1e-12, atol=1e-12)
        assert (true - repeated(model(x), len(elements))).abs().max() > 1e-3  # afterwards nothing is perturbed any more
        seen += len(elements)
    assert seen >= 9


def test_queries_stay_together_up_to_their_layer_where_nothing_leads_around_it():
    x = torch.randn(2, 3, 6, 9)
    assert try_out(convolution(kernel_size=3, padding=1), x)[0].part_late == [True] * 4
    assert try_out(Residual(), x)[0].part_late == [False, False, True, True]


def test_the_widest_output_of_a_layer_is_known():
    assert try_out(convolution(kernel_size=3), torch.randn(2, 3, 6, 9))[1] == 6 * 4 * 7


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.b(F.conv2d(x, self.a.weight, self.a.bias, padding=1))


def last_layer_zero():
    net = Functional()
    nn.init.zeros_(net.b.weight)
    return net


REFUSED = {
    "a trainable BatchNorm": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)), "^0.weight belongs to BatchNorm2d"),
    "a BatchNorm in training": (lambda: nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, affine=False)), "^0.weight: more"),
    "Dropout in training": (lambda: nn.Sequential(nn.Conv2d(3, 2, 1), nn.Dropout()), "^0.weight: more"),
    "a weight used by itself": (Functional, "^a.weight: more than its module"),
    "the same, behind zeros": (last_layer_zero, "^a.weight: more than its module"),
    "a transposed convolution": (lambda: nn.ConvTranspose2d(3, 2, 1), "^weight belongs to ConvTranspose2d"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused(name):
    make, message = REFUSED[name]
    net = make()
    before = [t.clone() for t in (*net.parameters(), *net.buffers())]
    with pytest.raises(InputError, match=message) as error:
        try_out(net, torch.randn(2, 3, 6, 9))
    assert 'use zo.engine = "full"' in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, (*net.parameters(), *net.buffers()), strict=True))
