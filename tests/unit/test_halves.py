"""The compiled 3 x 3 convolution of changes against F.conv2d in float64, and what becomes of those that it cannot serve."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from dzhpc.engines.kernels import compiled as programs
from dzhpc.engines.kernels import halves as winograd
from dzhpc.job import processor

pytestmark = pytest.mark.compiles
COMPILER = any(map(shutil.which, programs.COMPILERS))
CAN = winograd.is_possible() and COMPILER
needs_it = pytest.mark.skipif(not CAN, reason="needs AVX-512 and a C++ compiler")
SERVED = {"fp32": True, "bf16": {"avx512_bf16", "amx_bf16"} & processor.capabilities() == {"avx512_bf16"}}  # AMX is faster
TYPES = [torch.float32, torch.bfloat16] if "avx512_bf16" in processor.capabilities() else [torch.float32]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3}  # of the outputs' norm: a few roundings
SHAPES = [  # C, O, H, W, border on the left, right, top and bottom
    (16, 16, 32, 32, (1, 1, 1, 1)),
    (32, 32, 16, 16, (1, 1, 1, 1)),
    (64, 64, 8, 8, (1, 1, 1, 1)),
    (16, 48, 7, 9, (1, 1, 1, 1)),
    (48, 16, 5, 4, (0, 0, 0, 0)),
    (80, 32, 3, 11, (2, 1, 0, 3)),
    (32, 16, 1, 1, (1, 1, 1, 1)),
    (16, 32, 3, 3, (0, 0, 0, 0)),
    (16, 16, 1, 2, (4, 5, 3, 7)),
    (18, 18, 16, 16, (1, 1, 1, 1)),
    (13, 37, 6, 5, (0, 1, 1, 0)),
    (40, 3, 9, 8, (1, 1, 1, 1)),
]


class Plain(winograd.Halves):
    """The steps of halves.cpp by torch, on any processor: sums in float64, rounded where the kernel stores its own type."""

    INPUTS = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))  # B'
    OUTPUTS = ((1, 1, 1, 0), (0, 1, -1, -1))  # A'

    def __init__(self, compiler: str = ""):
        pass

    def __call__(self, images, kernels, outputs, border, centred=None):
        coords, batch, channels, height, width = images.shape
        left, right, top, bottom = border
        rows, columns = height + top + bottom - 2, width + left + right - 2
        tall, wide = -(-rows // 2), -(-columns // 2)
        _, steps, filled, step = kernels.shape  # [16, C / s, O, s], both filled up to multiples of 16
        beyond = (left, 2 * wide + 2 - left - width, top, 2 * tall + 2 - top - height, 0, step * steps - channels)
        tiles = F.pad(images.flatten(0, 1), beyond).double().unfold(2, 4, 2).unfold(3, 4, 2)
        inputs, back = (torch.tensor(rows, dtype=torch.float64) for rows in (self.INPUTS, self.OUTPUTS))
        tiles = (inputs @ tiles @ inputs.T).to(kernels.dtype)  # [N, C, tall, wide, 4, 4]
        if step == 2 and tiles.shape[1] % 32 == 0:  # of 32 channels the even ones first
            tiles = tiles.unflatten(1, (-1, 16, 2)).transpose(2, 3).flatten(1, 3)
        tiles = tiles.unflatten(1, (steps, step)).flatten(-2)
        products = torch.einsum("ncsyxk,kcos->noyxk", tiles.double(), kernels.double()).unflatten(-1, (4, 4))
        out = (back @ products @ back.T).transpose(3, 4).reshape(coords * batch, filled, 2 * tall, 2 * wide)
        out = out[:, :outputs, :rows, :columns].unflatten(0, (coords, batch))
        means = None
        if centred is not None:
            crossed = (out * (2 * centred.to(images.dtype).double() + out)).mean((1, 3, 4))
            means = torch.stack([out.mean((1, 3, 4)), crossed]).float()
        return out.to(images.dtype), means


def kernel():
    return winograd.Halves(next(filter(shutil.which, programs.COMPILERS)))


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def problem(c, o, h, w, border, dtype, coords=3, batch=5):
    """(changes, weights, border, centred) and the outputs and means that float64 gives."""
    left, right, top, bottom = border
    images = torch.randn(coords, batch, c, h, w).mul(torch.logspace(-6, 2, coords)[:, None, None, None, None]).to(dtype)
    weight = torch.randn(o, c, 3, 3)
    centred = torch.randn(batch, o, h + top + bottom - 2, w + left + right - 2).to(dtype)
    out = F.conv2d(F.pad(images.double().flatten(0, 1), border), weight.double()).unflatten(0, (coords, batch))
    crossed = (out * (2 * centred.double() + out)).mean((1, 3, 4))
    return images, weight, centred, out, torch.stack([out.mean((1, 3, 4)), crossed])


@pytest.mark.parametrize("way", ["plain", pytest.param("compiled", marks=needs_it)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_means_are_those_of_float64(shape, dtype, way):
    if way == "compiled" and dtype not in TYPES:
        pytest.skip("needs bfloat16 products")
    border, convolve = shape[-1], kernel() if way == "compiled" else Plain()
    images, weight, centred, expected, means = problem(*shape, dtype)
    kernels = winograd.transformed(weight, dtype)
    for beside in (None, centred, centred.to(memory_format=torch.channels_last)):
        out, found = convolve(images, kernels, shape[1], border, beside)
        assert out.shape == expected.shape
        assert out.dtype == dtype
        for k in range(len(images)):  # coordinates of very different sizes
            assert relative(out[k], expected[k]) < TOLERANCE[dtype]
            if beside is not None:
                scale = expected[k].abs().mean(), expected[k].square().mean() + expected[k].abs().mean()
                assert float((found[0, k] - means[0, k]).abs().max() / scale[0]) < TOLERANCE[dtype]
                assert float((found[1, k] - means[1, k]).abs().max() / scale[1]) < 2 * TOLERANCE[dtype]


@needs_it
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_bits_do_not_depend_on_company_or_threads(dtype):
    images, weight, centred, *_ = problem(27, 48, 9, 10, (1, 1, 1, 1), dtype, coords=4, batch=7)
    kernels, before = winograd.transformed(weight, dtype), torch.get_num_threads()
    together = kernel()(images, kernels, 48, (1, 1, 1, 1), centred)
    try:
        torch.set_num_threads(3)
        threaded = kernel()(images, kernels, 48, (1, 1, 1, 1), centred)
    finally:
        torch.set_num_threads(before)
    alone = [kernel()(images[k : k + 1], kernels, 48, (1, 1, 1, 1), centred) for k in range(4)]
    outputs, means = torch.cat([out for out, _ in alone]), torch.cat([found for _, found in alone], 1)
    for other in (threaded, (outputs, means)):
        assert torch.equal(together[0], other[0])
        assert torch.equal(together[1], other[1])
