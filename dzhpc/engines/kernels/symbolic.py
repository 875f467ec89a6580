"""The number of coordinates in a chunk as a symbol: tensors without values that have it, and which numbers it may stand for.

torch's own parts for it are imported when they are first needed: they take a while, and reference engines need none of them.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

HINT = 7  # coordinates that a trace is made with: no other size is likely to be equal, or a multiple
Made = TypeVar("Made")


def form(tensor: Tensor, axis: int | None) -> tuple:
    """What programs are made for: sizes and strides of a tensor, whatever its number of coordinates along ``axis``."""
    shape, stride = list(tensor.shape), list(tensor.stride())
    if axis is not None:
        stride[axis] = _stride(tensor, axis)
        shape[axis] = -1
    return (*shape, *stride, tensor.dtype)


def for_count(
    made: dict[tuple, Made], kind: tuple, count: int, make: Callable[[Sequence[int | None]], Made], axes: Sequence[int | None]
) -> Made:
    """The program of a kind of tensors: ``make(axes)``, or one for so many coordinates alone where it does not hold for them."""
    if kind not in made:
        try:
            made[kind] = make(axes)
        except Exception:  # some function of a user's own that needs to know the number
            made[kind] = None
    if made[kind] is not None and made[kind].holds(count):
        return made[kind]
    if (kind, count) not in made:
        made[kind, count] = make([None] * len(axes))
    return made[kind, count]


class Range:
    """For which numbers of coordinates a trace and its program hold: those that no assumption made on the way excludes."""

    def __init__(self, env, symbol):
        self._env, self._symbol, self._known = env, symbol, {}  # count -> whether

    def __call__(self, count: int) -> bool:
        if count not in self._known:
            self._known[count] = self._check(count)
        return self._known[count]

    def _check(self, count: int) -> bool:
        if self._symbol in self._env.replacements:
            return False
        return all(bool(guard.expr.subs({self._symbol: count})) for guard in self._env.guards)


def any_count():
    """(a mode in which tensors without values are made, a size that may be any number of coordinates)."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC])
    return mode, mode.from_tensor(torch.empty(HINT), symbolic_context=context).shape[0]


def sample(mode, tensor: Tensor, axis: int | None, count) -> Tensor:
    """A tensor without values like this one, of ``count`` coordinates along ``axis``."""
    shape, stride = list(tensor.shape), list(tensor.stride())
    if axis is not None:
        shape[axis], stride[axis] = count, _stride(tensor, axis)
    with mode:
        return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)


def _stride(tensor: Tensor, axis: int) -> int:
    """Along the axis of coordinates; of a single one, where it may be anything, as it is of several in a row."""
    if tensor.shape[axis] > 1:
        return tensor.stride(axis)
    return 1 + sum((n - 1) * s for k, (n, s) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)) if k != axis)


def alone(size) -> int:
    """A size for a single coordinate."""
    return size if isinstance(size, int) else int(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, 1)))
