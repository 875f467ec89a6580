"""The change of a value for a chunk of coordinates, and an operation as its rule sees it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dzhpc.engines.kernels.find import Kernels
from dzhpc.engines.kernels.library import Layer, Planes


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

    def rows(self, x: Tensor) -> Tensor:
        """As :meth:`dense`, for x [B, K] and by channels: [P, K, B], contiguous."""
        if self.channel is None or self.axis != 1:
            return self.dense(x).transpose(1, 2).contiguous()
        found = self.data.new_zeros(len(self.data), x.shape[1], x.shape[0])
        found[torch.arange(len(self.data)), self.channel] = self.data
        return found

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
class Origin:
    """The change that a parameter's own operation makes, not made yet: a compiled pass can make it where it is used."""

    make: Callable[..., Tensor]  # data of the change from ``tensors``, by torch operations alone
    tensors: list[Tensor]  # vectors of integers have an entry a coordinate, [P]; all others belong to every coordinate
    channel: Tensor | None
    axis: int = 1
    name: str = ""  # of the parameter in its module
    source: Planes | Layer | None = None  # how our own library makes it, if it can
    constant: bool = False  # whether it is the same number in all samples and pixels of its channel

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
    kernels: Kernels | None = None  # None: torch alone, where there is no compiler, or too little work for one

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


def flattened(changes: list) -> list:
    """All changes, those in list arguments included."""
    return [c for item in changes for c in (item if isinstance(item, list) else [item])]
