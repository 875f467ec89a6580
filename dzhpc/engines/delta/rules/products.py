"""Sums and products: of values that may all change, broadcast against each other."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dzhpc.engines.delta.change import Change, Operation
from dzhpc.engines.delta.differences import LARGE, softmax_change
from dzhpc.engines.kernels.find import Kernels


def add(op: Operation) -> Change:
    """D1 + alpha D2, broadcast as the values are."""
    return _sum(op, op.kwargs.get("alpha", 1))


def sub(op: Operation) -> Change:
    """D1 - alpha D2, broadcast as the values are."""
    return _sum(op, -op.kwargs.get("alpha", 1))


def _sum(op: Operation, alpha: float) -> Change:
    first, second = op.changes[:2]
    if second is None and op.x.shape == op.value.shape:
        return first
    if first is None and op.args[1].shape == op.value.shape:
        return second.like(second.data * alpha)
    parts = []
    for x, change, factor in ((op.args[0], first, 1), (op.args[1], second, alpha)):
        if change is not None:
            parts.append(aligned(change.dense(x), op.value) * factor)
    return Change(expanded(sum(parts), op.value))


def aligned(data: Tensor, value: Tensor) -> Tensor:
    """[P, *shape] with ones between, so that it broadcasts against ``value`` behind P."""
    return data.reshape(data.shape[0], *[1] * (value.ndim + 1 - data.ndim), *data.shape[1:])


def expanded(data: Tensor, value: Tensor) -> Tensor:
    """[P, *value.shape]."""
    return data.expand(data.shape[0], *value.shape)


def product(op: Operation) -> Change:
    """a b: Da b + a Db + Da Db; a scalar or unchanging factor keeps a one-channel change one-channel."""
    (a, b), (da, db) = op.args[:2], op.changes[:2]
    if db is None or da is None:
        x, change, other = (a, da, b) if db is None else (b, db, a)
        if not isinstance(other, Tensor) or other.ndim == 0:
            return change.like(change.data * other)
        if other.shape == x.shape:
            return change.like(change.data * change.of(other))
    parts = []
    if da is not None:
        parts.append(aligned(da.dense(a), op.value) * b)
    if db is not None:
        parts.append(aligned(db.dense(b), op.value) * a)
    if da is not None and db is not None:
        parts.append(aligned(da.dense(a), op.value) * aligned(db.dense(b), op.value))
    return Change(expanded(sum(parts), op.value))


def quotient(op: Operation) -> Change:
    """a / b: (Da - (a/b) Db) / (b + Db)."""
    (a, b), (da, db) = op.args[:2], op.changes[:2]
    if db is None and (not isinstance(b, Tensor) or b.ndim == 0):
        return da.like(da.data / b)
    top = aligned(da.dense(a), op.value) if da is not None else 0
    if db is None:
        return Change(expanded(top / b, op.value))
    db = aligned(db.dense(b), op.value)
    return Change(expanded((top - op.value * db) / (b + db), op.value))


def bilinear(op: Operation) -> Change:
    """matmul, bmm and whatever else is linear in each of its first two arguments: Da (b + Db) + a Db."""
    (a, b), (da, db) = op.args[:2], op.changes[:2]
    run = lambda x, y: op.run((x, y, *op.args[2:]), op.kwargs)  # noqa: E731
    da, db = (None if d is None else d.dense(x) for x, d in ((a, da), (b, db)))
    if db is None:
        return Change(torch.vmap(run, (0, None))(da, b))
    fixed = torch.vmap(run, (None, 0))(a, db)
    return Change(fixed if da is None else torch.vmap(run)(da, b + db) + fixed)


def attention(op: Operation) -> Change:
    """Scaled dot-product attention, composed of product, softmax and product."""
    query, key, value = op.args[:3]
    scale = op.kwargs.get("scale") or 1 / math.sqrt(query.shape[-1])
    keys, scores, blind, weights = op.cached("attention", lambda: _attention(op, scale))
    change, (dq, dk, dv, dm) = None, [*op.changes, None][:4]
    dk = None if dk is None else Change(dk.dense(key).transpose(-2, -1) * scale)
    matmul = lambda args, kwargs: args[0] @ args[1]  # noqa: E731
    if dq is not None or dk is not None:
        change = bilinear(Operation(matmul, (query, keys), {}, [dq, dk], scores)).data
    if dm is not None:
        bias = expanded(aligned(dm.dense(op.args[3]), scores), scores)
        change = bias if change is None else change + bias
    if change is not None:
        data = softened(op.kernels, scores, weights, change, -1)
        masked = op.arg(3, "attn_mask") is not None or op.arg(5, "is_causal", False)
        change = Change(data.masked_fill(blind, 0) if masked else data)
    return bilinear(Operation(matmul, (weights, value), {}, [change, dv], op.value))


def _attention(op: Operation, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys times scale, scores, queries without any key (their output is zero), and weights, at theta."""
    keys = op.args[1].transpose(-2, -1) * scale
    scores, mask = op.args[0] @ keys, op.arg(3, "attn_mask")
    if op.arg(5, "is_causal", False):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    blind = (scores == -math.inf).all(-1, keepdim=True)
    return keys, scores, blind, scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)


def softened(kernels: Kernels | None, x: Tensor, p: Tensor, d: Tensor, dim: int) -> Tensor:
    """What a softmax along an axis, counted from the end, makes of a change."""
    found = kernels.call(_small_change(dim), p, d, common=[0]) if kernels else _small_change(dim)(p, d)
    if d.device.type == "cpu":  # a GPU would be waited for
        least, largest = torch.aminmax(d)
        if least > -LARGE and largest < LARGE:
            return found
    return torch.where(d.abs().amax(dim, keepdim=True) < LARGE, found, torch.softmax(x + d, dim) - p)


@functools.cache
def _small_change(dim: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda p, d: softmax_change(p, d, dim)
