"""How a change travels through each operation: exact, without linearisation, and without subtracting nearby numbers.

x: base value, D: its change. A rule gets base values and changes of an operation's inputs and returns the change of its output.

| operation | change of the output |
|---|---|
| convolution, linear | W * D; only the column W[:, c] where D lives in one channel c |
| add, sub, mean, average pool, cat, pad, slice, reshape, permute | the operation itself, applied to D |
| relu | max(D + min(x, 0), -max(x, 0)) |
| max pool | max_i [(x_i - x_max) + D_i] |
| batch norm (train) | g [D_c/s' - x_c (s' - s)/(s s')], with D_c = D - mean D, s'^2 = s^2 + 2 mean(D_c x_c) + mean(D_c^2) |
| product a b | Da b + a Db + Da Db |
| softmax p | p (e - r)/(1 + r), with e = expm1(D), r = sum p e |
| anything else | f(x + D) - f(x), coordinate by coordinate |
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


@dataclass
class Change:
    """The change of one value for a chunk of P coordinates.

    channel None: data [P, *x.shape]. Else each coordinate changes one channel only: data [P, *x.shape without axis], and
    channel [P] says which one along ``axis`` of x.
    """

    data: Tensor
    channel: Tensor | None = None
    axis: int = 1

    def dense(self, x: Tensor) -> Tensor:
        """[P, *x.shape]."""
        if self.channel is None:
            return self.data
        p = len(self.data)
        out = self.data.new_zeros(p, *x.shape)
        out.movedim(self.axis + 1, 1)[torch.arange(p, device=out.device), self.channel] = self.data
        return out

    def of(self, x: Tensor) -> Tensor:
        """What of x (or of a per-channel vector, then broadcast) stands beside ``data``."""
        return x if self.channel is None else x.movedim(self.axis, 0)[self.channel]

    def like(self, data: Tensor) -> "Change":
        return Change(data, self.channel, self.axis)


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

    def cached(self, name: str, make: Callable):
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


def fallback(op: Operation) -> Change | None:
    """f(x + D) - f(x) coordinate by coordinate: an operation may couple the samples of a batch."""
    count = next(len(c.data) for c in flat(op.changes) if c is not None)
    rows = []
    for k in range(count):
        args = [shifted(a, c, k) for a, c in zip(op.args, op.changes, strict=True)]
        rows.append(op.run(tuple(args), op.kwargs) - op.value)
    return Change(torch.stack(rows))


def shifted(x, change, k: int):
    """x plus its change for the k-th coordinate."""
    if isinstance(change, list):
        return [shifted(a, c, k) for a, c in zip(x, change, strict=True)]
    return x if change is None else x + Change(change.data[k : k + 1], *_slice(change, k)).dense(x)[0]


def _slice(change: Change, k: int) -> tuple:
    return (None if change.channel is None else change.channel[k : k + 1], change.axis)


def flat(changes: list) -> list:
    """All changes, those in list arguments included."""
    return [c for item in changes for c in (item if isinstance(item, list) else [item])]


# --- linear and structural operations ------------------------------------------------------------------------------------


def linear_map(op: Operation) -> Change | None:
    """The operation itself on D, for operations linear in their first argument (mean, average pool, reshape, permute, slice)."""
    data = op.d.dense(op.x)
    return Change(torch.vmap(lambda d: op.run((d, *op.args[1:]), op.kwargs))(data))


def per_channel_map(op: Operation) -> Change | None:
    """As :func:`linear_map`, for spatial operations that leave channels alone: a one-channel change stays one-channel."""
    if op.d.channel is None or op.d.axis != 1:
        return linear_map(op)
    run = lambda d: op.run((d[:, None], *op.args[1:]), op.kwargs)[:, 0]  # noqa: E731
    return op.d.like(torch.vmap(run)(op.d.data))


def identity(op: Operation) -> Change | None:
    """Nothing is done to the value (dropout in eval mode, contiguous, Identity)."""
    return op.d


def split(op: Operation) -> list[Change]:
    """chunk, split, unbind: one change per piece."""
    pieces = torch.vmap(lambda d: op.run((d, *op.args[1:]), op.kwargs))(op.d.dense(op.x))
    return [Change(piece) for piece in pieces]


def getitem(op: Operation) -> Change | None:
    """A piece of a list of values, or an index into a tensor."""
    if isinstance(op.d, list):
        return op.d[op.args[1]]
    return linear_map(op)


def mean(op: Operation) -> Change | None:
    """A mean over spatial axes leaves a one-channel change one-channel."""
    dims, keepdim = op.arg(1, "dim"), op.arg(2, "keepdim", False)
    dims = [dims] if isinstance(dims, int) else dims
    if op.d.channel is None or dims is None or op.d.axis != 1 or not {k % op.x.ndim for k in dims} <= set(range(2, op.x.ndim)):
        return linear_map(op)
    return op.d.like(op.d.data.mean([k % op.x.ndim for k in dims], keepdim))


def pad(op: Operation) -> Change | None:
    """Padding adds values that do not change: zeros of D."""
    mode = op.arg(2, "mode", "constant")
    args = (op.args[1] if len(op.args) > 1 else op.kwargs["pad"], mode, 0.0 if mode == "constant" else None)
    return Change(torch.vmap(lambda d: F.pad(d, *args))(op.d.dense(op.x)))


def cat(op: Operation) -> Change | None:
    """Concatenation of the changes, zeros where an input does not change."""
    changes = op.d if isinstance(op.d, list) else [op.d]
    count = next(len(c.data) for c in changes if c is not None)
    pieces = [x.new_zeros(count, *x.shape) if c is None else c.dense(x) for x, c in zip(op.args[0], changes, strict=True)]
    return Change(torch.vmap(lambda *d: op.run((list(d), *op.args[1:]), op.kwargs))(*pieces))


def add(op: Operation) -> Change | None:
    """D1 + alpha D2, broadcast as the values are."""
    return _sum(op, op.kwargs.get("alpha", 1))


def sub(op: Operation) -> Change | None:
    """D1 - alpha D2, broadcast as the values are."""
    return _sum(op, -op.kwargs.get("alpha", 1))


def _sum(op: Operation, alpha: float) -> Change | None:
    first, second = op.changes[:2]
    if second is None and op.x.shape == op.value.shape:
        return first
    if first is None and op.args[1].shape == op.value.shape:
        return second.like(second.data * alpha)
    parts = []
    for x, change, factor in ((op.args[0], first, 1), (op.args[1], second, alpha)):
        if change is not None:
            parts.append(_aligned(change.dense(x), op.value) * factor)
    return Change(_expanded(sum(parts), op.value))


def _aligned(data: Tensor, value: Tensor) -> Tensor:
    """[P, *shape] with ones between, so that it broadcasts against ``value`` behind P."""
    return data.reshape(len(data), *[1] * (value.ndim + 1 - data.ndim), *data.shape[1:])


def _expanded(data: Tensor, value: Tensor) -> Tensor:
    return data.expand(len(data), *value.shape)


# --- products ------------------------------------------------------------------------------------------------------------


def product(op: Operation) -> Change | None:
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
        parts.append(_aligned(da.dense(a), op.value) * b)
    if db is not None:
        parts.append(_aligned(db.dense(b), op.value) * a)
    if da is not None and db is not None:
        parts.append(_aligned(da.dense(a), op.value) * _aligned(db.dense(b), op.value))
    return Change(_expanded(sum(parts), op.value))


def quotient(op: Operation) -> Change | None:
    """a / b: (Da - (a/b) Db) / (b + Db)."""
    (a, b), (da, db) = op.args[:2], op.changes[:2]
    if db is None and (not isinstance(b, Tensor) or b.ndim == 0):
        return da.like(da.data / b)
    top = _aligned(da.dense(a), op.value) if da is not None else 0
    if db is None:
        return Change(_expanded(top / b, op.value))
    db = _aligned(db.dense(b), op.value)
    return Change(_expanded((top - op.value * db) / (b + db), op.value))


def bilinear(op: Operation) -> Change | None:
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


def attention(op: Operation) -> Change | None:
    """Scaled dot-product attention, composed of product, softmax and product."""
    query, key, value = op.args[:3]
    mask, causal = op.arg(3, "attn_mask"), op.arg(5, "is_causal", False)
    if op.arg(4, "dropout_p", 0.0) > 0 or op.kwargs.get("enable_gqa", False):
        return fallback(op)
    scale = op.kwargs.get("scale") or 1 / math.sqrt(query.shape[-1])
    keys = key.transpose(-2, -1) * scale
    scores = query @ keys
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    dq, dk, dv = op.changes[:3]
    dk = None if dk is None else Change(dk.dense(key).transpose(-2, -1) * scale)
    matmul = lambda args, kwargs: args[0] @ args[1]  # noqa: E731
    weights, change = scores.softmax(-1), None
    if dq is not None or dk is not None:
        change = bilinear(Operation(matmul, (query, keys), {}, [dq, dk], scores))
        change = Change(softmax_change(weights, change.data, -1))
    return bilinear(Operation(matmul, (weights, value), {}, [change, dv], op.value))


# --- convolution and linear layers ---------------------------------------------------------------------------------------


def convolution(op: Operation) -> Change | None:
    """W * D without bias, for a conv2d module; a one-channel D meets W[:, c] only."""
    conv = op.module
    if not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return fallback(op)
    if op.d.channel is not None and conv.groups == 1:
        return Change(_convolve_one_channel(conv, op.d))
    data = op.d.dense(op.x)
    flat_data = data.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    out = F.conv2d(flat_data, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return Change(out.unflatten(0, data.shape[:2]))


def _convolve_one_channel(conv: nn.Conv2d, change: Change) -> Tensor:
    """[P, B, H, W] -> [P, B, O, H', W']: the shifted copies of D as rows of a matrix product with W[:, c]."""
    windows = shifts(F.pad(change.data, _padding(conv)), conv)  # k*k of [P, B, H', W']
    rows = torch.stack(windows, dim=-1)
    weights = conv.weight.flatten(2)[:, change.channel].permute(1, 2, 0)  # [P, k*k, O]
    out = torch.bmm(rows.flatten(1, 3), weights)
    return out.unflatten(1, rows.shape[1:4]).permute(0, 1, 4, 2, 3)


def _padding(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    return (conv.padding[1], conv.padding[1], conv.padding[0], conv.padding[0])


def shifts(padded: Tensor, conv: nn.Conv2d) -> list[Tensor]:
    """For each kernel position (row-major) what it sees of the padded input [..., H, W]: [..., H', W']."""
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    height = (padded.shape[-2] - dh * (kh - 1) - 1) // sh + 1
    width = (padded.shape[-1] - dw * (kw - 1) - 1) // sw + 1
    return [
        padded[..., a * dh : a * dh + (height - 1) * sh + 1 : sh, b * dw : b * dw + (width - 1) * sw + 1 : sw]
        for a in range(kh)
        for b in range(kw)
    ]


def linear_layer(op: Operation) -> Change | None:
    """W D without bias; a one-channel D meets the column W[:, c]."""
    return Change(_apply_linear(op.module.weight, op.d, op.x))


def linear_function(op: Operation) -> Change | None:
    """F.linear(x, W, b) where any of the three may change."""
    x, weight = op.args[0], op.args[1] if len(op.args) > 1 else op.kwargs["weight"]
    changes = [*op.changes, None, None][:3]
    parts = []
    if changes[0] is not None:
        parts.append(_apply_linear(weight, changes[0], x))
    if changes[1] is not None:
        dw = changes[1].dense(weight)
        parts.append(torch.vmap(F.linear, (None, 0))(x, dw))
        if changes[0] is not None:
            parts.append(torch.vmap(F.linear)(changes[0].dense(x), dw))
    if changes[2] is not None:
        parts.append(_expanded(_aligned(changes[2].data, op.value), op.value))
    return Change(sum(parts))


def _apply_linear(weight: Tensor, change: Change, x: Tensor) -> Tensor:
    if change.channel is not None and change.axis == x.ndim - 1:
        column = weight.t()[change.channel]  # [P, O]
        return change.data[..., None] * column.reshape(len(column), *[1] * (change.data.ndim - 1), -1)
    return F.linear(change.dense(x), weight)


# --- elementwise functions -----------------------------------------------------------------------------------------------


def elementwise(difference: Callable[..., Tensor]) -> Callable[[Operation], Change | None]:
    """A rule from ``difference(op, x, d)`` = f(x + d) - f(x), element by element."""

    def rule(op: Operation) -> Change | None:
        return op.d.like(difference(op, op.d.of(op.x), op.d.data))

    return rule


def relu_difference(x: Tensor, d: Tensor) -> Tensor:
    """relu(x + d) - relu(x) without cancellation."""
    return torch.maximum(d + x.clamp(max=0), -x.clamp(min=0))


def sigmoid_difference(x: Tensor, d: Tensor) -> Tensor:
    """s(x) s(-x) e / (1 + s(x) e), e = expm1(d)."""
    s, e = torch.sigmoid(x), torch.expm1(d)
    return s * torch.sigmoid(-x) * e / (1 + s * e)


def tanh_difference(x: Tensor, d: Tensor) -> Tensor:
    """tanh(x) = 2 sigmoid(2x) - 1."""
    return 2 * sigmoid_difference(2 * x, 2 * d)


def silu_difference(x: Tensor, d: Tensor) -> Tensor:
    """x s(x): d s(x + d) + x [s(x + d) - s(x)]."""
    return d * torch.sigmoid(x + d) + x * sigmoid_difference(x, d)


GAUSS = ((0.1127016653792583, 5 / 18), (0.5, 8 / 18), (0.8872983346207417, 5 / 18))  # nodes and weights on [0, 1]


def gelu_difference(x: Tensor, d: Tensor) -> Tensor:
    """x Phi(x): d Phi(x + d) + x int_x^{x+d} phi, by three Gauss points where d is small and by subtraction elsewhere."""
    cdf = lambda t: 0.5 * torch.erfc(-t / math.sqrt(2))  # noqa: E731
    density = lambda t: torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)  # noqa: E731
    small = d * sum(w * density(x + t * d) for t, w in GAUSS)
    return d * cdf(x + d) + x * torch.where(d.abs() < 0.25, small, cdf(x + d) - cdf(x))


def gelu_tanh_difference(x: Tensor, d: Tensor) -> Tensor:
    """x (1 + tanh u) / 2 with u = c (x + a x^3)."""
    a, c = 0.044715, math.sqrt(2 / math.pi)
    u, du = c * (x + a * x**3), c * (d + a * d * (3 * x * x + 3 * x * d + d * d))
    return 0.5 * (d * (1 + torch.tanh(u + du)) + x * tanh_difference(u, du))


def clamp_difference(x: Tensor, d: Tensor, low: float, high: float) -> Tensor:
    """clamp(x + d) - clamp(x)."""
    c = x.clamp(low, high)
    return torch.maximum(torch.minimum(d + (x - c), high - c), low - c)


def softmax_change(p: Tensor, d: Tensor, dim: int) -> Tensor:
    """p (e - r) / (1 + r), e = expm1(d), r = sum p e."""
    e = torch.expm1(d)
    r = (p * e).sum(dim, keepdim=True)
    return p * (e - r) / (1 + r)


def softmax(op: Operation) -> Change | None:
    """Softmax along the operation's axis."""
    dim = op.module.dim if op.module is not None else op.arg(1, "dim")
    return Change(softmax_change(op.value, op.d.dense(op.x), dim if dim < 0 else dim + 1))


def gelu(op: Operation) -> Change | None:
    """GELU, exact or by tanh."""
    kind = op.module.approximate if op.module is not None else op.kwargs.get("approximate", "none")
    return op.d.like((gelu_difference if kind == "none" else gelu_tanh_difference)(op.d.of(op.x), op.d.data))


def leaky_relu(op: Operation) -> Change | None:
    """slope d + (1 - slope) [relu(x + d) - relu(x)]."""
    slope = op.module.negative_slope if op.module is not None else op.arg(1, "negative_slope", 0.01)
    return op.d.like(slope * op.d.data + (1 - slope) * relu_difference(op.d.of(op.x), op.d.data))


# --- pooling by maximum --------------------------------------------------------------------------------------------------


def max_pool(op: Operation) -> Change | None:
    """max_i [(x_i - x_max) + D_i] over each window."""
    m = op.module
    names = (("kernel_size", None), ("stride", None), ("padding", 0), ("dilation", 1), ("ceil_mode", False))
    if m is not None:
        kernel, stride, padding, dilation, ceil = (getattr(m, name) for name, _ in names)
    else:
        kernel, stride, padding, dilation, ceil = (op.arg(k + 1, name, default) for k, (name, default) in enumerate(names))
    if ceil or op.x.ndim != 4:
        return fallback(op)
    pairs = [(v, v) if isinstance(v, int) else tuple(v) for v in (kernel, stride or kernel, padding, dilation)]
    window = _Window(*pairs)
    border = (pairs[2][1], pairs[2][1], pairs[2][0], pairs[2][0])
    change = op.d if op.d.axis == 1 else Change(op.d.dense(op.x))
    x, top = F.pad(op.x, border, value=-math.inf), op.value
    out = None
    for xi, di in zip(shifts(x, window), shifts(F.pad(change.data, border), window), strict=True):
        candidate = change.of(xi - top) + di
        out = candidate if out is None else torch.maximum(out, candidate)
    return change.like(out)


@dataclass
class _Window:
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


# --- normalisation -------------------------------------------------------------------------------------------------------


def statistics(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean, sqrt(variance + eps)) over ``dims``, kept as axes of length one."""
    centred = x - x.mean(dims, keepdim=True)
    return centred, ((centred * centred).mean(dims, keepdim=True) + eps).sqrt()


def coefficients(d: Tensor, centred: Tensor, s: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(mean D, 1/s', (s' - s)/(s s')) over ``dims``: all that a normalised change needs beside D itself.

    Three sums in one pass: dv = 2 mean(D x_c) + mean(D^2) - (mean D)^2, since x_c has mean zero.
    """
    mean_d = d.mean(dims, keepdim=True)
    dv = (2 * d * centred + d * d).mean(dims, keepdim=True) - mean_d * mean_d
    s2 = (s * s + dv).sqrt()
    return mean_d, 1 / s2, dv / ((s2 + s) * s * s2)


def normalised_change(d: Tensor, centred: Tensor, s: Tensor, dims: list[int]) -> Tensor:
    """Change of x_c / s, s^2 = mean(x_c^2) + eps over ``dims``: D_c/s' - x_c (s' - s)/(s s')."""
    mean_d, scale, shrink = coefficients(d, centred, s, dims)
    return (d - mean_d) * scale - centred * shrink


def batch_norm(op: Operation) -> Change | None:
    """Batch statistics in train mode, an affine map per channel in eval mode; a one-channel change stays one-channel."""
    m, x, change = op.module, op.x, _along_channels(op)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    gamma = m.weight.reshape(shape) if m.weight is not None else x.new_ones([1, x.shape[1], *shape[2:]])
    if not uses_batch_statistics(m):
        factor = gamma / (m.running_var.reshape(shape) + m.eps).sqrt()
        return change.like(change.data * change.of(factor))
    mean_d, scale, shrink = op.cache.get("coefficients") or batch_coefficients(op)
    centred, _ = batch_statistics(op)
    return change.like(((change.data - mean_d) * scale - change.of(centred) * shrink) * change.of(gamma))


def uses_batch_statistics(m: nn.Module) -> bool:
    """Whether a BatchNorm layer normalises by the batch at hand."""
    return m.training or m.running_var is None


def batch_statistics(op: Operation) -> tuple[Tensor, Tensor]:
    """(x - mean, s) of a BatchNorm layer's input, once a batch."""
    return op.cached("statistics", lambda: statistics(op.x, [0, *range(2, op.x.ndim)], op.module.eps))


def batch_coefficients(op: Operation) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`coefficients` of a BatchNorm layer: a pass of its own, which is faster than one that also applies them."""
    change, (centred, s) = _along_channels(op), batch_statistics(op)
    dims = [1, *range(3, op.x.ndim + 1)] if change.channel is None else list(range(1, change.data.ndim))
    return coefficients(change.data, change.of(centred), change.of(s), dims)


def _along_channels(op: Operation) -> Change:
    return op.d if op.d.channel is None or op.d.axis == 1 else Change(op.d.dense(op.x))


def layer_norm(op: Operation) -> Change | None:
    """Per-token statistics."""
    if op.module is not None:
        shape, weight, eps = op.module.normalized_shape, op.module.weight, op.module.eps
    else:
        shape, weight, eps = op.args[1], op.arg(2, "weight"), op.arg(4, "eps", 1e-5)
        if any(c is not None for c in op.changes[1:]):
            return fallback(op)
    dims = list(range(-len(shape), 0))
    centred, s = op.cached("statistics", lambda: statistics(op.x, dims, eps))
    out = normalised_change(op.d.dense(op.x), centred, s, dims)
    return Change(out * weight if weight is not None else out)


def group_norm(op: Operation) -> Change | None:
    """Statistics per sample and group of channels."""
    m, x = op.module, op.x
    grouped = x.reshape(x.shape[0], m.num_groups, -1)
    centred, s = op.cached("statistics", lambda: statistics(grouped, [-1], m.eps))
    data = op.d.dense(x)
    out = normalised_change(data.reshape(len(data), *grouped.shape), centred, s, [-1]).reshape(data.shape)
    return Change(out if m.weight is None else out * m.weight.reshape(-1, *[1] * (x.ndim - 2)))


# --- seeds: the change that a parameter's own operation makes ------------------------------------------------------------


def seed(op: Operation, name: str, local: np.ndarray, mu: float) -> Change | None:
    """Change of the output for mu e_j on parameter ``name`` of ``op.module``, j in ``local`` [P]; None where no rule is known."""
    place = np.unravel_index(local, getattr(op.module, name).shape) if hasattr(op.module, name) else None
    if place is None:
        return None
    place = [torch.from_numpy(k).to(op.x.device) for k in place]
    rule = SEEDS.get((type(op.module), name))
    return rule(op, place, mu) if rule else None


def _seed_conv_weight(op: Operation, place: list[Tensor], mu: float) -> Change | None:
    """mu x_i shifted by (kh, kw), strided and padded as the convolution, on channel o."""
    conv = op.module
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    out_channel, in_channel, kh, kw = place
    in_channel = in_channel + out_channel // (conv.out_channels // conv.groups) * (conv.in_channels // conv.groups)
    seen = op.cached("shifts", lambda: shifts(F.pad(op.x, _padding(conv)).transpose(0, 1).contiguous(), conv))
    position = kh * conv.kernel_size[1] + kw
    data = op.x.new_empty(len(position), *seen[0].shape[1:])
    for k in range(len(seen)):  # as many as the kernel has positions, not coordinates
        here = (position == k).nonzero()[:, 0]
        data[here] = seen[k][in_channel[here]]
    return Change(data.mul_(mu), out_channel, 1)


def _seed_linear_weight(op: Operation, place: list[Tensor], mu: float) -> Change:
    """mu x_i on feature o."""
    return Change(mu * op.x.movedim(-1, 0)[place[1]], place[0], op.x.ndim - 1)


def _seed_constant(axis: int) -> Callable:
    """mu on one channel: biases."""

    def rule(op: Operation, place: list[Tensor], mu: float) -> Change:
        k = axis % op.value.ndim
        shape = [n for i, n in enumerate(op.value.shape) if i != k]
        return Change(op.value.new_full((len(place[0]), *shape), mu), place[0], k)

    return rule


def _seed_scale(axis: int) -> Callable:
    """mu times the normalised input on one channel: the weights of normalisation layers."""

    def rule(op: Operation, place: list[Tensor], mu: float) -> Change | None:
        if len(place) > 1:
            return None
        k = axis % op.value.ndim
        normalised = op.cached("normalised", lambda: _without_affine(op.module, op.x).movedim(k, 0).contiguous())
        return Change(mu * normalised[place[0]], place[0], k)

    return rule


def _without_affine(m: nn.Module, x: Tensor) -> Tensor:
    """x normalised as the layer does it, before weight and bias; no running statistic moves."""
    if isinstance(m, nn.LayerNorm):
        return F.layer_norm(x, m.normalized_shape, eps=m.eps)
    if isinstance(m, nn.GroupNorm):
        return F.group_norm(x, m.num_groups, eps=m.eps)
    if m.training or m.running_var is None:
        return F.batch_norm(x, None, None, training=True, eps=m.eps)
    return F.batch_norm(x, m.running_mean, m.running_var, eps=m.eps)


SEEDS: dict[tuple[type, str], Callable] = {(nn.Conv2d, "weight"): _seed_conv_weight, (nn.Linear, "weight"): _seed_linear_weight}
for _kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm):
    SEEDS[_kind, "weight"], SEEDS[_kind, "bias"] = _seed_scale(1), _seed_constant(1)
SEEDS[nn.LayerNorm, "weight"], SEEDS[nn.LayerNorm, "bias"] = _seed_scale(-1), _seed_constant(-1)
SEEDS[nn.Conv2d, "bias"], SEEDS[nn.Linear, "bias"] = _seed_constant(1), _seed_constant(-1)


# --- which rule serves which operation -------------------------------------------------------------------------------------

_relu = elementwise(lambda op, x, d: relu_difference(x, d))
_sigmoid = elementwise(lambda op, x, d: sigmoid_difference(x, d))
_tanh = elementwise(lambda op, x, d: tanh_difference(x, d))
_silu = elementwise(lambda op, x, d: silu_difference(x, d))
_relu6 = elementwise(lambda op, x, d: clamp_difference(x, d, 0.0, 6.0))
_exp = elementwise(lambda op, x, d: torch.exp(x) * torch.expm1(d))
_square = elementwise(lambda op, x, d: d * (2 * x + d))
_neg = elementwise(lambda op, x, d: -d)

MODULES: dict[type, Callable] = {
    nn.Conv2d: convolution, nn.Linear: linear_layer, nn.LayerNorm: layer_norm, nn.GroupNorm: group_norm,
    nn.BatchNorm1d: batch_norm, nn.BatchNorm2d: batch_norm, nn.BatchNorm3d: batch_norm,
    nn.ReLU: _relu, nn.ReLU6: _relu6, nn.LeakyReLU: leaky_relu, nn.GELU: gelu, nn.SiLU: _silu, nn.Sigmoid: _sigmoid,
    nn.Tanh: _tanh, nn.Softmax: softmax, nn.MaxPool2d: max_pool, nn.AvgPool2d: per_channel_map,
    nn.AdaptiveAvgPool2d: per_channel_map, nn.Flatten: linear_map, nn.Identity: identity, nn.Dropout: identity,
    nn.Dropout2d: identity,
}  # fmt: skip

FUNCTIONS: dict[str, Callable] = {
    "add": add, "sub": sub, "mul": product, "multiply": product, "truediv": quotient, "div": quotient, "neg": _neg,
    "matmul": bilinear, "bmm": bilinear, "linear": linear_function, "scaled_dot_product_attention": attention,
    "cat": cat, "concat": cat, "pad": pad, "getitem": getitem, "chunk": split, "split": split, "unbind": split,
    "mean": mean, "sum": linear_map, "flatten": linear_map, "reshape": linear_map, "view": linear_map,
    "permute": linear_map, "transpose": linear_map, "t": linear_map, "squeeze": linear_map, "unsqueeze": linear_map,
    "expand": linear_map, "movedim": linear_map, "contiguous": identity, "unflatten": linear_map,
    "relu": _relu, "relu6": _relu6, "leaky_relu": leaky_relu, "gelu": gelu, "silu": _silu, "sigmoid": _sigmoid,
    "tanh": _tanh, "softmax": softmax, "exp": _exp, "square": _square, "avg_pool2d": per_channel_map,
    "adaptive_avg_pool2d": per_channel_map, "max_pool2d": max_pool, "layer_norm": layer_norm, "dropout": identity,
}  # fmt: skip

BY_FUNCTION = {
    getattr(home, name): rule
    for name, rule in FUNCTIONS.items()
    for home in (torch, F, operator)
    if callable(getattr(home, name, None))
}

#: elementwise or nearly so: the compiler merges a run of these into few passes over memory
FUSABLE = {
    add, sub, product, quotient, mean, pad, identity, leaky_relu, gelu, max_pool, batch_norm, per_channel_map,
    _relu, _sigmoid, _tanh, _silu, _relu6, _exp, _square, _neg,
}  # fmt: skip


def find(node: fx.Node, module: nn.Module | None) -> Callable:
    """The rule of an operation; :func:`fallback` where there is none."""
    if node.op == "call_module":
        return MODULES.get(type(module), fallback)
    if node.op == "call_method":
        return FUNCTIONS.get(node.target, fallback)
    return BY_FUNCTION.get(node.target, fallback)
