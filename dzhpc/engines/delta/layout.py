"""How changes and base values lie in memory: channels apart or last, rounded or not."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How base values [B, C, H, W] lie beside changes in a run.

    apart: as :func:`channels_apart`. rounded: to the type that dense changes travel in, where that is narrower.
    """

    apart: bool
    rounded: bool

    def of(self, value: Tensor, dtype: torch.dtype, travel: torch.dtype) -> Tensor:
        """The value so; integers, and types other than the parameters' ``dtype``, are never rounded."""
        if self.apart and value.ndim == 4:
            value = channels_apart(value)
        return value.to(travel) if self.rounded and value.dtype == dtype else value


def channels_apart(images: Tensor) -> Tensor:
    """The same values [..., B, C, H, W], each channel for itself with the batch innermost: shifts and strides stay contiguous."""
    if images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last):  # twice as fast as at one go
        b, c, h, w = images.shape
        transposed = images.permute(0, 2, 3, 1).reshape(b, -1).t().contiguous()  # [H W C, B]
        return transposed.view(h, w, c, b).permute(2, 0, 1, 3).contiguous().movedim(-1, -4)
    return images.movedim(-4, -1).contiguous().movedim(-1, -4)


def channels_last(images: Tensor) -> Tensor:
    """The same values [..., B, C, H, W], the channels innermost: what convolutions like best."""
    return images.movedim(-3, -1).contiguous().movedim(-1, -3)


def is_apart(data: Tensor) -> bool:
    """Whether dense changes [P, B, C, H, W] have their batch innermost."""
    return data.ndim == 5 and data.stride(1) == 1 and data.shape[1] > 1


def fills_vectors(channels: int) -> bool:
    """Whether rows of so many channels fill the vectors of a CPU; channels are better kept apart where they do not."""
    return channels % 16 == 0
