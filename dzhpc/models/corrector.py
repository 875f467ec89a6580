"""The corrective network of Um et al. 2020 as in DeepZero: 56,898 parameters at widths (32, 64), 1,010 at (8,), 506 at (4,)."""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LANES = 16  # outputs that a vector unit makes at once


class Corrector(nn.Module):
    """[B, channels + 1, H, W] -> [B, channels, H, W]: convolutions that keep the size, ReLU between them.

    dims: space axes; 1: kernels 1 x ``kernel`` for states [B, C, 1, X]. The last layer begins at zero: no correction.
    """

    def __init__(self, channels: int = 2, widths: Sequence[int] = (32, 64), kernel: int = 5, dims: int = 2):
        super().__init__()
        if min([channels, kernel, *widths]) < 1 or kernel % 2 == 0 or dims not in (1, 2):
            raise ValueError(
                f"channels = {channels}, widths = {list(widths)}, kernel = {kernel}, dims = {dims}: expected positive numbers, "
                "an odd kernel, and 1 or 2 dims"
            )
        sizes, layers = [channels + 1, *widths, channels], []
        for size, following in itertools.pairwise(sizes):
            layers += [NarrowConv2d(size, following, (kernel if dims == 2 else 1, kernel)), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers[:-1])
        nn.init.zeros_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class NarrowConv2d(nn.Conv2d):
    """A convolution that keeps the size, several times faster than torch's for fewer than LANES / 2 output channels.

    Then blocks of a x b neighbouring outputs become channels: the kernel, shifted to each place of the block, moves in steps of
    (a, b). The added products are with zeros.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int]):
        super().__init__(in_channels, out_channels, kernel, padding=(kernel[0] // 2, kernel[1] // 2))

    def forward(self, x: Tensor) -> Tensor:
        many, (h, w) = LANES // self.out_channels, x.shape[2:]
        if many <= 2:
            return super().forward(x)
        a = math.gcd(h, 2)
        b = math.gcd(w, 1 << (many // a).bit_length() - 1)
        blocks = F.conv2d(x, self._shifted(a, b), self.bias.repeat_interleave(a * b), (a, b), self.padding)
        return blocks.unflatten(1, (-1, a, b)).permute(0, 1, 4, 2, 5, 3).reshape(len(x), -1, h, w)

    def _shifted(self, a: int, b: int) -> Tensor:
        """The kernel at each place of a block [out a b, in, kh + a - 1, kw + b - 1]."""
        places = [F.pad(self.weight, (j, b - 1 - j, i, a - 1 - i)) for i in range(a) for j in range(b)]
        shifted = torch.stack(places, 1).flatten(0, 1)
        narrow = self.weight.is_contiguous(memory_format=torch.channels_last)
        return shifted.contiguous(memory_format=torch.channels_last) if narrow else shifted
