"""The Triton kernels, run by Triton's interpreter on the CPU, against float64: alone, and on the way of an engine's changes.

``TRITON_INTERPRET=1 python -m pytest tests/unit/interpreted.py``: Triton must know before it is imported, so that
test_triton.py starts this file in a process of its own. Without that variable the kernels are compiled, for the GPU at hand.
"""

import copy
import os

import numpy as np
import pytest
import torch

from dzhpc.engines import make_engine
from dzhpc.engines.delta.engine import Delta
from dzhpc.engines.kernels import gpu
from dzhpc.engines.kernels import triton_passes as passes
from dzhpc.engines.kernels.find import PROVIDERS
from dzhpc.models.resnet import ResNet

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def error(found, true):
    return float((found.double() - true).norm() / true.norm())


@pytest.mark.parametrize(("channels", "rows"), [(20, 700), (70, 40), (1, 5000)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_sums_and_passes_are_those_of_float64(channels, rows, dtype, tolerance):
    data, residual = (1e-3 * torch.randn(2, 3, rows, channels)).to(DEVICE, dtype)
    centred, value = torch.randn(2, rows, channels).to(DEVICE, dtype)
    coefficients = torch.randn(3, 3, channels).to(DEVICE)
    d, r, x, v, (mean, scale, shrink) = *(t.double() for t in (data, residual, centred, value)), coefficients.double().unbind(1)
    true = torch.stack([d.mean(1), (d * (2 * x + d)).mean(1)])
    means = passes.sums(data, centred)
    assert means.dtype == torch.float32 and error(means, true) < 1e-6  # summed in float32, whatever travels
    base = (d - mean[:, None]) * scale[:, None] - x * shrink[:, None]
    for beside, kink in ((None, None), (None, value), (residual, None), (residual, value)):
        true = base if beside is None else base + r
        true = true if kink is None else torch.relu(v + true) - torch.relu(v)
        found = passes.carry(data, centred, coefficients, beside, kink)
        assert found.dtype == dtype and error(found, true) < tolerance
    alone = [passes.carry(data[k : k + 1], centred, coefficients[k : k + 1], None, value) for k in range(3)]
    assert torch.equal(torch.cat(alone), passes.carry(data, centred, coefficients, None, value))
    assert torch.equal(torch.cat([passes.sums(data[k : k + 1], centred) for k in range(3)], 1), means)


class Anywhere(gpu.TritonPasses):
    """The provider, on a CPU too; it counts."""

    asked = 0

    def __init__(self):
        super().__init__()
        carry = self.carry

        def counted(*given):
            Anywhere.asked += 1
            return carry(*given)

        self.carry = counted

    @staticmethod
    def types(device):
        return [torch.float32, torch.bfloat16]


@pytest.mark.compiles
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_an_engine_whose_passes_are_these_kernels_agrees_with_float64(monkeypatch, precision, tolerance):
    monkeypatch.setitem(PROVIDERS, "pass", [Anywhere])
    monkeypatch.setattr(Anywhere, "asked", 0)
    network = ResNet([2, 1], [4, 8], False, 10, 3)
    for p in network.parameters():
        p.data += 0.05 * torch.randn_like(p)
    network = network.to(DEVICE, memory_format=torch.channels_last)
    inputs, labels = torch.randn(6, 3, 8, 8).to(DEVICE), torch.randint(0, 10, (6,)).to(DEVICE)
    coords = np.array([0, 110, 250, 500, 900, 1200, 1300])
    full = make_engine("full", copy.deepcopy(network).double(), "cross_entropy")
    full.bind(inputs.double(), labels)
    engine = Delta(network, "cross_entropy", precision, largest=2, emulate=True)  # too little work for a compiler
    engine.bind(inputs, labels)
    assert error(engine.differences(coords, 1e-3), full.differences(coords, 1e-3)) < tolerance
    assert Anywhere.asked > 5
