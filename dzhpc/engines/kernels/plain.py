"""Torch's own operations as kernels: they say what is right, and serve wherever nothing faster does."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dzhpc.engines.windows import borders, padded


class Torch:
    """Any convolution, by F.conv2d. See :class:`dzhpc.engines.kernels.find.Convolution`."""

    name = "torch"

    @staticmethod
    def types(device: torch.device) -> list[torch.dtype]:
        """None that it would be named for: it is what there is without kernels."""
        return []

    @staticmethod
    def fits(conv: nn.Conv2d, like: Tensor) -> bool:
        """Always."""
        return True

    @staticmethod
    def weights(conv: nn.Conv2d, dtype: torch.dtype) -> Tensor:
        """[O, C / groups, *kernel]."""
        return conv.weight.to(dtype)

    def convolve(
        self, conv: nn.Conv2d, data: Tensor, weights: Tensor, centred: Callable[[], Tensor] | None
    ) -> tuple[Tensor, None]:
        """[P, ..., C, H, W] -> [P, ..., O, H', W']."""
        border = borders(conv)
        merged = data.flatten(0, -4).contiguous(memory_format=torch.channels_last)
        if conv.padding_mode == "zeros" and border[0] == border[1] and border[2] == border[3]:
            padding = (border[2], border[0])
        else:
            merged, padding = padded(merged, border, conv.padding_mode), 0
        out = F.conv2d(merged, weights, None, conv.stride, padding, conv.dilation, conv.groups)
        return out.unflatten(0, data.shape[:-3]), None
