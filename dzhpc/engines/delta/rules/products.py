"""Sums and products: of values that may all change, broadcast against each other."""

import math

import torch
from torch import Tensor

from dzhpc.engines.delta.change import Change, Operation
from dzhpc.engines.delta.differences import softmax_change


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
    """matmul, bmm and whatever else is linear in each of its first two arguments."""
    (a, b), (da, db) = op.args[:2], op.changes[:2]
    run = lambda x, y: op.run((x, y, *op.args[2:]), op.kwargs)  # noqa: E731
    da, db = (None if d is None else d.dense(x) for x, d in ((a, da), (b, db)))
    parts = []
    if da is not None:
        parts.append(torch.vmap(run, (0, None))(da, b))
    if db is not None:
        parts.append(torch.vmap(run, (None, 0))(a, db))
    if da is not None and db is not None:
        parts.append(torch.vmap(run)(da, db))
    return Change(sum(parts))


def attention(op: Operation) -> Change:
    """Scaled dot-product attention, composed of product, softmax and product."""
    query, key, value = op.args[:3]
    mask, causal = op.arg(3, "attn_mask"), op.arg(5, "is_causal", False)
    scale = op.kwargs.get("scale") or 1 / math.sqrt(query.shape[-1])
    keys = key.transpose(-2, -1) * scale
    scores = query @ keys
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    blind = (scores == -math.inf).all(-1, keepdim=True)  # queries without any key: their output is zero
    weights, change = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0), None
    dq, dk, dv = op.changes[:3]
    dk = None if dk is None else Change(dk.dense(key).transpose(-2, -1) * scale)
    matmul = lambda args, kwargs: args[0] @ args[1]  # noqa: E731
    if dq is not None or dk is not None:
        change = bilinear(Operation(matmul, (query, keys), {}, [dq, dk], scores))
        change = Change(softmax_change(scores, weights, change.data, -1).masked_fill(blind, 0))
    return bilinear(Operation(matmul, (weights, value), {}, [change, dv], op.value))
