"""Operations that move values and compute nothing: reshape, slice, concatenate, pad; and means and sums, linear as these."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from dzhpc.engines.delta.change import Change, Operation
from dzhpc.engines.delta.layout import is_apart


def linear_map(op: Operation) -> Change:
    """The operation itself on D, for operations linear in their first argument (mean, average pool, reshape, permute, slice)."""
    data = op.d.dense(op.x)
    return Change(torch.vmap(lambda d: op.run((d, *op.args[1:]), op.kwargs))(data))


def view(op: Operation) -> Change:
    """As :func:`linear_map`; a change may lie in memory in another order than the value, and a view takes one order only."""
    return linear_map(replace(op, changes=[Change(op.d.dense(op.x).contiguous())]))


def identity(op: Operation) -> Change:
    """Nothing is done to the value (contiguous, Identity)."""
    return op.d


def dropout(op: Operation) -> Change:
    """Nothing is done in eval mode, and nothing passes at p = 1; all else draws random numbers, and the engine refuses it."""
    m = op.module
    p, training = (m.p, m.training) if m is not None else (op.arg(1, "p", 0.5), op.arg(2, "training", True))
    return op.d.like(torch.zeros_like(op.d.data)) if training and p == 1 else op.d


def split(op: Operation) -> list[Change]:
    """chunk, split, unbind: one change per piece."""
    pieces = torch.vmap(lambda d: op.run((d, *op.args[1:]), op.kwargs))(op.d.dense(op.x))
    return [Change(piece) for piece in pieces]


def getitem(op: Operation) -> Change | list[Change]:
    """A piece of a list of values, or an index into a tensor; slices beside the channel axis leave it alone."""
    index = op.args[1]
    if isinstance(op.d, list):
        return op.d[index]
    pieces = index if isinstance(index, tuple) else (index,)
    if not all(k is None or k is Ellipsis or isinstance(k, (int, slice)) for k in pieces):
        return linear_map(op)
    axis = op.d.axis
    if op.d.channel is not None:
        if len(pieces) <= axis or pieces[axis] != slice(None) or not all(isinstance(k, slice) for k in pieces):
            return Change(op.d.dense(op.x)[(slice(None), *pieces)])
        pieces = pieces[:axis] + pieces[axis + 1 :]
    return op.d.like(op.d.data[(slice(None), *pieces)])


def mean(op: Operation) -> Change:
    """A mean over spatial axes leaves a one-channel change one-channel."""
    dims, keepdim = op.arg(1, "dim"), op.arg(2, "keepdim", False)
    dims = [dims] if isinstance(dims, int) else dims
    if op.d.channel is None or dims is None or op.d.axis != 1 or not {k % op.x.ndim for k in dims} <= set(range(2, op.x.ndim)):
        return linear_map(op)
    return op.d.like(op.d.data.mean([k % op.x.ndim for k in dims], keepdim))


def pad(op: Operation) -> Change:
    """Padding adds values that do not change: zeros of D. Zeros on the channel axis move a one-channel change."""
    border, mode = list(op.arg(1, "pad")), op.arg(2, "mode", "constant")
    if mode == "constant" and op.d.channel is not None and len(border) == 2 * (op.x.ndim - op.d.axis):
        *inner, front, back = border
        if front >= 0 and back >= 0:
            return Change(F.pad(op.d.data, inner) if inner else op.d.data, op.d.channel + front, op.d.axis)
    data = op.d.dense(op.x)
    if mode == "constant" and is_apart(data):
        return Change(F.pad(data.movedim(1, -1), [0, 0, *border]).movedim(-1, 1))
    if mode == "constant" and op.x.ndim == 4:  # as one batch, whose layout survives
        return Change(F.pad(data.flatten(0, 1), border).unflatten(0, data.shape[:2]))
    return Change(torch.vmap(lambda d: F.pad(d, border, mode, 0.0 if mode == "constant" else None))(data))


def cat(op: Operation) -> Change:
    """Concatenation of the changes, zeros where an input does not change."""
    changes = op.d if isinstance(op.d, list) else [op.d]
    count = next(len(c.data) for c in changes if c is not None)
    pieces = [x.new_zeros(count, *x.shape) if c is None else c.dense(x) for x, c in zip(op.args[0], changes, strict=True)]
    return Change(torch.vmap(lambda *d: op.run((list(d), *op.args[1:]), op.kwargs))(*pieces))
