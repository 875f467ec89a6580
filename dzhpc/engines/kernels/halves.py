"""3 x 3 convolutions of changes in bfloat16 on a CPU with its products: 16 a channel, not 36, a BatchNorm's sums at no cost.

A convolution of a library reads and writes memory and leaves the sums that a BatchNorm needs to another pass; ``halves.cpp``
does all of it in a core's cache. F.conv2d says what is right, and serves where there is no AVX-512 or no C++ compiler.
Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dzhpc.engines.kernels.build import shared_library
from dzhpc.engines.kernels.compiled import compiler as first_compiler
from dzhpc.engines.windows import borders
from dzhpc.job import processor

SOURCE = Path(__file__).with_suffix(".cpp")
BASE = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
# where torch's own convolution is faster: vectors mostly filled up by zeros, kernels beyond a core's cache, blocks half empty
NARROW, LARGEST, TILES, FULL = 12, 2**23, 16, 0.7
TRANSFORM = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))  # G


class Halves:
    """Convolves changes. Raises OSError, with its first words, where the compiler fails.

    compiler: a C++ compiler's command (None: the first that is found). Its result is kept where torch keeps compiled code.
    """

    name = "halves"

    def __init__(self, compiler: str | None = None):
        self._function = _library(compiler or first_compiler()).winograd
        self._function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int] * 2

    def __call__(
        self, images: Tensor, kernels: Tensor, outputs: int, border: tuple[int, int, int, int], centred: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Changes D [P, B, C, H, W] -> those of the outputs [P, B, O, H', W'], channels last, and with ``centred`` two means.

        kernels: of O = ``outputs`` channels, from :func:`transformed`. border: zeros on the left, right, top and bottom.
        centred: the base outputs less their mean over batch and pixels, x_c [B, O, H', W']; then mean(D) and
        mean(D (2 x_c + D)) [2, P, O] in float32.
        """
        coords, batch, channels, height, width = images.shape
        left, right, top, bottom = border
        rows, columns = height + top + bottom - 2, width + left + right - 2
        merged = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        out = merged.new_empty((coords * batch, rows, columns, outputs))
        beside, sums = None, None
        if centred is not None:
            beside = centred.to(images.dtype).contiguous(memory_format=torch.channels_last)
            sums = torch.empty(coords, batch, 2, outputs)
        shape = (ctypes.c_int32 * 10)(coords, batch, height, width, channels, top, left, rows, columns, outputs)
        pointers = [None if t is None else t.data_ptr() for t in (merged, kernels, out, beside, sums)]
        if self._function(*pointers, shape, images.dtype == torch.bfloat16, torch.get_num_threads()):
            raise RuntimeError("this processor has no bfloat16 products (avx512_bf16): ask `fits` first")
        means = None if sums is None else sums.double().sum(1).div(batch * rows * columns).float().movedim(1, 0)
        return out.permute(0, 3, 1, 2).unflatten(0, (coords, batch)), means

    def convolve(
        self, conv: nn.Conv2d, data: Tensor, weights: Tensor, centred: Callable[[], Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Changes [P, B, C, H, W] through a layer that :meth:`fits`; ``weights`` from :meth:`weights`."""
        return self(data, weights, conv.out_channels, borders(conv), centred and centred())

    @staticmethod
    def types(device: torch.device) -> list[torch.dtype]:
        """What it may serve on this machine."""
        if device.type != "cpu" or not is_possible():
            return []
        return [torch.bfloat16] if has_halves() else []

    @staticmethod
    def fits(conv: nn.Conv2d, like: Tensor) -> bool:
        """Whether it serves changes like these on this machine, and faster than torch."""
        return like.dtype in Halves.types(like.device) and fits(conv, like)

    @staticmethod
    def weights(conv: nn.Conv2d, dtype: torch.dtype) -> Tensor:
        """See :func:`transformed`."""
        return transformed(conv.weight, dtype)


def is_possible() -> bool:
    """Whether this process may use AVX-512."""
    return processor.capabilities().issuperset(BASE)


def has_halves() -> bool:
    """Whether bfloat16 gains: torch's own products are faster with AMX."""
    have = processor.capabilities()
    return "avx512_bf16" in have and "amx_bf16" not in have


def fits(conv: nn.Conv2d, data: Tensor) -> bool:
    """Whether changes [P, B, C, H, W] pass through this layer so, and faster than by torch."""
    plain = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1
    known = data.dtype == torch.float32 or (data.dtype == torch.bfloat16 and has_halves())
    if not (plain and known and conv.padding_mode == "zeros" and data.ndim == 5):
        return False
    wide = min(conv.in_channels, conv.out_channels) >= NARROW
    small = 16 * conv.in_channels * conv.out_channels * data.element_size() <= LARGEST
    tiles = math.ceil(data.shape[-2] / 2) * math.ceil(data.shape[-1] / 2)
    return wide and small and tiles >= FULL * TILES * math.ceil(tiles / TILES)


def transformed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """G g G' of a layer's weights [O, C, 3, 3], as the kernel reads them: [16, C / s, O, s], s channels an instruction.

    Zeros fill O and C up to multiples of 16.
    """
    g = torch.tensor(TRANSFORM, dtype=torch.float64)
    weight = F.pad(weight, (0, 0, 0, 0, 0, -weight.shape[1] % 16, 0, -weight.shape[0] % 16))
    outputs, channels = weight.shape[:2]
    kernels = (g @ weight.double() @ g.T).permute(2, 3, 1, 0).reshape(16, channels, outputs)
    step = 2 if dtype == torch.bfloat16 else 1
    if step == 2 and channels % 32 == 0:  # the kernel reads 32 channels as the even and the odd ones
        kernels = kernels.reshape(16, channels // 32, 16, 2, outputs).transpose(2, 3)
    return kernels.reshape(16, channels // step, step, outputs).transpose(2, 3).contiguous().to(dtype)


@functools.cache
def _library(compiler: str) -> ctypes.CDLL:
    narrow = ["-mavx512bf16"] if "avx512_bf16" in processor.capabilities() else []
    return shared_library(SOURCE, compiler, ("-mfma", *("-m" + name.replace("_", "") for name in BASE), *narrow))
