"""Convolutions of changes by our own library: Winograd's algorithm for 3 x 3, sums in registers for all others.

What a library of convolutions leaves out is made on the way: the sums that a BatchNorm behind needs. F.conv2d says what is right,
and serves where there is no compiler.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dzhpc.engines.kernels.library import BATCH, Library, direct_weights, winograd_weights
from dzhpc.engines.windows import borders, window_of

TILE, FULL = 4, 0.5  # outputs on a side of a tile; how much of all tiles must lie within the image


class Own:
    """A convolution by the library. Raises OSError, with its first words, where the compiler fails."""

    name: str

    def __init__(self):
        self._library = Library()

    @staticmethod
    def types(device: torch.device) -> list[torch.dtype]:
        """What it may serve on this machine."""
        return [torch.float32, torch.bfloat16] if device.type == "cpu" else []

    @classmethod
    def fits(cls, conv: nn.Conv2d, like: Tensor) -> bool:
        """Whether it serves changes like these."""
        known = like.dtype in cls.types(like.device) and conv.weight.dtype == torch.float32
        full = like.ndim == 5 and like.shape[1] >= BATCH
        return known and full and conv.groups == 1 and conv.padding_mode == "zeros" and min(borders(conv)) >= 0

    def convolve(
        self, conv: nn.Conv2d, data: Tensor, weights: Tensor, centred: Callable[[], Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Changes [P, B, C, H, W] through a layer that :meth:`fits`; ``weights`` from :meth:`weights`."""
        beside = centred and centred()
        out, means = self._library.convolve(data, weights, conv.out_channels, window_of(conv), borders(conv), beside, self.name)
        return out, None if means is None else means.movedim(2, 0)


class Winograd(Own):
    """3 x 3 at stride 1: 36 products for 16 outputs, by the algorithm F(4 x 4, 3 x 3)."""

    name = "winograd"

    @classmethod
    def fits(cls, conv: nn.Conv2d, like: Tensor) -> bool:
        """Where tiles are not mostly beyond the image."""
        plain = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.dilation == (1, 1)
        if not (plain and super().fits(conv, like)):
            return False
        left, right, top, bottom = borders(conv)
        rows, columns = like.shape[-2] + top + bottom - 2, like.shape[-1] + left + right - 2
        return rows * columns >= FULL * math.prod(TILE * math.ceil(n / TILE) for n in (rows, columns))

    @staticmethod
    def weights(conv: nn.Conv2d, dtype: torch.dtype) -> Tensor:
        """See :func:`winograd_weights`."""
        return winograd_weights(conv.weight, dtype)


class Direct(Own):
    """Any kernel, stride and dilation."""

    name = "direct"

    @staticmethod
    def weights(conv: nn.Conv2d, dtype: torch.dtype) -> Tensor:
        """See :func:`direct_weights`."""
        return direct_weights(conv.weight, dtype)
