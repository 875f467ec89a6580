"""The change of a value for a chunk of coordinates, and an operation as its rule sees it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dzhpc.engines.kernels.winograd import Winograd


@dataclass
class Change:
    """The change of one value for a chunk of P coordinates.

    channel None: data [P, *x.shape]. Else each coordinate changes one channel only: data [P, *x.shape without axis], and
    channel [P] says which one along ``axis`` of x. means: mean(D) and mean(D (2 x_c + D)) over batch and pixels [2, P, C], x_c
    the centred x, where whoever made the change knows them.
    """

    data: Tensor
    channel: Tensor | None = None
    axis: int = 1
    means: Tensor | None = None

    def dense(self, x: Tensor) -> Tensor:
        """[P, *x.shape]."""
        if self.channel is None:
            return self.data
        shape = [1] * (x.ndim + 1)
        shape[self.axis + 1] = x.shape[self.axis]
        channels = torch.arange(x.shape[self.axis], device=self.data.device).view(shape)
        own = channels == self.channel.view(-1, *[1] * x.ndim)
        return torch.where(own, self.data.unsqueeze(self.axis + 1), 0)

    def of(self, x: Tensor) -> Tensor:
        """What of x (or of a per-channel vector, then broadcast) stands beside ``data``."""
        return x if self.channel is None else x.movedim(self.axis, 0)[self.channel]

    def like(self, data: Tensor) -> "Change":
        """Other data on the same channels, with no means yet."""
        return Change(data, self.channel, self.axis)

    def to(self, dense: torch.dtype, one_channel: torch.dtype) -> "Change":
        """In the type that a change of its kind travels in."""
        return self.like(self.data.to(dense if self.channel is None else one_channel))


@dataclass
class Seed:
    """The change that a parameter's own operation makes, not made yet: a compiled pass can make it where it is used."""

    make: Callable[..., Tensor]  # data of the change from ``tensors``, by torch operations alone
    tensors: list[Tensor]
    channel: Tensor | None
    axis: int = 1
    name: str = ""  # of the parameter in its module

    def now(self) -> Change:
        """The change itself."""
        return Change(self.make(*self.tensors), self.channel, self.axis)


@dataclass
class Operation:
    """One operation with its base inputs and their changes."""

    run: Callable  # the operation itself, on (args, kwargs)
    args: tuple
    kwargs: dict
    changes: list  # parallel to args: Change, None, or a list of such for a list argument
    value: object  # the base output
    module: nn.Module | None = None
    cache: dict = field(default_factory=dict)  # of this operation and batch: what only depends on base values
    compiled: Callable | None = None  # (function, *tensors) -> a compiled function's result; None: there is no compiler
    winograd: Winograd | None = None  # None: there is none here, or it is not worth it
    centred: Callable[[], Tensor] | None = None  # of the base output, where a BatchNorm behind wants means

    def cached(self, name: object, make: Callable):
        """``make()``, computed once a batch."""
        if name not in self.cache:
            self.cache[name] = make()
        return self.cache[name]

    def arg(self, position: int, name: str, default=None):
        """A non-tensor argument, by position or name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def x(self) -> Tensor:
        return self.args[0]

    @property
    def d(self) -> Change | None:
        return self.changes[0]


def shifted(x, change, k: int):
    """x plus its change for the k-th coordinate."""
    if isinstance(change, list):
        return [shifted(a, c, k) for a, c in zip(x, change, strict=True)]
    if change is None:
        return x
    channel = None if change.channel is None else change.channel[k : k + 1]
    return x + Change(change.data[k : k + 1], channel, change.axis).dense(x)[0]


def flat(changes: list) -> list:
    """All changes, those in list arguments included."""
    return [c for item in changes for c in (item if isinstance(item, list) else [item])]


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
