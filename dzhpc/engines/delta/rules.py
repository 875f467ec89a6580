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

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dzhpc.engines.delta.change import Change, Operation, channels_apart, channels_last, fills_vectors, flat, is_apart, shifted
from dzhpc.engines.delta.differences import (
    clamp_difference,
    coefficients,
    coefficients_of_means,
    exp_difference,
    gelu_difference,
    gelu_tanh_difference,
    log_softmax_change,
    normalised_change,
    relu_difference,
    sigmoid_difference,
    silu_difference,
    softmax_change,
    statistics,
    tanh_difference,
)
from dzhpc.engines.kernels import winograd

Rule = Callable[[Operation], Change]


def fallback(op: Operation) -> Change:
    """f(x + D) - f(x) coordinate by coordinate: an operation may couple the samples of a batch."""
    count = next(len(c.data) for c in flat(op.changes) if c is not None)
    base, rows = op.run(op.args, op.kwargs), []  # not op.value, which may stem from a float64 pass
    for k in range(count):
        args = [shifted(a, c, k) for a, c in zip(op.args, op.changes, strict=True)]
        rows.append(op.run(tuple(args), op.kwargs) - base)
    return Change(torch.stack(rows))


# --- linear and structural operations ------------------------------------------------------------------------------------


def linear_map(op: Operation) -> Change:
    """The operation itself on D, for operations linear in their first argument (mean, average pool, reshape, permute, slice)."""
    data = op.d.dense(op.x)
    return Change(torch.vmap(lambda d: op.run((d, *op.args[1:]), op.kwargs))(data))


def view(op: Operation) -> Change:
    """As :func:`linear_map`; a change may lie in memory in another order than the value, and a view takes one order only."""
    return linear_map(replace(op, changes=[Change(op.d.dense(op.x).contiguous())]))


def average_pool(op: Operation) -> Change:
    """An average over windows of images [B, C, H, W]: applied to all P B of them; a one-channel change stays one-channel."""
    if op.x.ndim != 4:
        return linear_map(op)
    run = lambda images: op.run((images, *op.args[1:]), op.kwargs)  # noqa: E731
    if op.d.channel is not None and op.d.axis == 1:
        return op.d.like(run(op.d.data.flatten(0, 1)[:, None])[:, 0].unflatten(0, op.d.data.shape[:2]))
    data = op.d.dense(op.x)
    return Change(run(data.flatten(0, 1)).unflatten(0, data.shape[:2]))


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
    if mode == "constant" and op.x.ndim == 4:  # as one batch, whose layout survives
        return Change(F.pad(data.flatten(0, 1), border).unflatten(0, data.shape[:2]))
    return Change(torch.vmap(lambda d: F.pad(d, border, mode, 0.0 if mode == "constant" else None))(data))


def cat(op: Operation) -> Change:
    """Concatenation of the changes, zeros where an input does not change."""
    changes = op.d if isinstance(op.d, list) else [op.d]
    count = next(len(c.data) for c in changes if c is not None)
    pieces = [x.new_zeros(count, *x.shape) if c is None else c.dense(x) for x, c in zip(op.args[0], changes, strict=True)]
    return Change(torch.vmap(lambda *d: op.run((list(d), *op.args[1:]), op.kwargs))(*pieces))


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
            parts.append(_aligned(change.dense(x), op.value) * factor)
    return Change(_expanded(sum(parts), op.value))


def _aligned(data: Tensor, value: Tensor) -> Tensor:
    """[P, *shape] with ones between, so that it broadcasts against ``value`` behind P."""
    return data.reshape(len(data), *[1] * (value.ndim + 1 - data.ndim), *data.shape[1:])


def _expanded(data: Tensor, value: Tensor) -> Tensor:
    return data.expand(len(data), *value.shape)


# --- products ------------------------------------------------------------------------------------------------------------


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
        parts.append(_aligned(da.dense(a), op.value) * b)
    if db is not None:
        parts.append(_aligned(db.dense(b), op.value) * a)
    if da is not None and db is not None:
        parts.append(_aligned(da.dense(a), op.value) * _aligned(db.dense(b), op.value))
    return Change(_expanded(sum(parts), op.value))


def quotient(op: Operation) -> Change:
    """a / b: (Da - (a/b) Db) / (b + Db)."""
    (a, b), (da, db) = op.args[:2], op.changes[:2]
    if db is None and (not isinstance(b, Tensor) or b.ndim == 0):
        return da.like(da.data / b)
    top = _aligned(da.dense(a), op.value) if da is not None else 0
    if db is None:
        return Change(_expanded(top / b, op.value))
    db = _aligned(db.dense(b), op.value)
    return Change(_expanded((top - op.value * db) / (b + db), op.value))


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


# --- convolution and linear layers ---------------------------------------------------------------------------------------


def convolution(op: Operation) -> Change:
    """W * D without bias; a one-channel D meets W[:, c] only."""
    conv = op.module
    border = borders(conv)
    if op.d.channel is not None and op.d.axis == 1 and op.x.ndim == 4 and conv.groups == 1:
        columns = conv.weight.flatten(2)[:, op.d.channel].permute(1, 2, 0).contiguous()  # [P, k*k, O]
        if op.compiled is None:
            return Change(_by_product(padded(op.d.data, border, conv.padding_mode), columns, window_of(conv)))
        return Change(op.compiled(_by_sum(window_of(conv), border, conv.padding_mode), op.d.data, columns))
    data = op.d.dense(op.x)
    if op.compiled and is_apart(data):
        data = op.compiled(channels_last, data)
    if op.winograd and winograd.fits(conv, data):
        kernels = op.cached(("transformed", data.dtype), lambda: winograd.transformed(conv.weight, data.dtype))
        out, means = op.winograd(data, kernels, conv.out_channels, border, op.centred and op.centred())
        return Change(out, means=means)
    weight = op.cached(("weight", data.dtype), lambda: conv.weight.to(data.dtype))
    merged = data.flatten(0, -4).contiguous(memory_format=torch.channels_last)
    if conv.padding_mode == "zeros" and border[0] == border[1] and border[2] == border[3]:
        padding = (border[2], border[0])
    else:
        merged, padding = padded(merged, border, conv.padding_mode), 0
    out = F.conv2d(merged, weight, None, conv.stride, padding, conv.dilation, conv.groups)
    return Change(out.unflatten(0, data.shape[:-3]))


@dataclass(frozen=True)
class Window:
    """What slides over an image, each as (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]


def window_of(conv: nn.Conv2d) -> Window:
    """The window of a convolution."""
    return Window(conv.kernel_size, conv.stride, conv.dilation)


def borders(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Padding on the left, right, top and bottom."""
    if isinstance(conv.padding, str):
        reach = [d * (k - 1) if conv.padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in reach)
        return left, right, top, bottom
    return (conv.padding[1], conv.padding[1], conv.padding[0], conv.padding[0])


def padded(data: Tensor, border: tuple[int, int, int, int], mode: str) -> Tensor:
    """Images [..., H, W] with a border as ``padding_mode`` says: linear in the data, whatever it says."""
    if not any(border):
        return data
    if mode == "zeros":
        return F.pad(data, border)
    out = F.pad(data.flatten(0, -3)[None], border, mode)[0]  # these modes take three or four axes only
    return out.unflatten(0, data.shape[:-2])


def shifts(padded: Tensor, window: Window) -> list[Tensor]:
    """For each kernel position (row-major) what it sees of the padded input [..., H, W]: [..., H', W']."""
    (kh, kw), (sh, sw), (dh, dw) = window.kernel, window.stride, window.dilation
    height = (padded.shape[-2] - dh * (kh - 1) - 1) // sh + 1
    width = (padded.shape[-1] - dw * (kw - 1) - 1) // sw + 1
    return [
        padded[..., a * dh : a * dh + (height - 1) * sh + 1 : sh, b * dw : b * dw + (width - 1) * sw + 1 : sw]
        for a in range(kh)
        for b in range(kw)
    ]


def _by_product(padded: Tensor, columns: Tensor, window: Window) -> Tensor:
    """[P, B, H, W], [P, k*k, O] -> [P, B, O, H', W']: the shifted copies of D as rows of a matrix product with W[:, c]."""
    rows = torch.stack(shifts(padded, window), dim=-1)
    out = torch.bmm(rows.flatten(1, 3), columns)
    return out.unflatten(1, rows.shape[1:4]).permute(0, 1, 4, 2, 3)


@functools.cache
def _by_sum(window: Window, border: tuple, mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    """As :func:`_by_product`, as a sum over kernel positions: a compiler makes one pass of it, three times faster in fp32."""

    def run(data: Tensor, columns: Tensor) -> Tensor:
        pieces = shifts(padded(data, border, mode), window)
        out = sum(piece[:, :, None] * columns[:, k, None, :, None, None] for k, piece in enumerate(pieces))
        return channels_last(out) if fills_vectors(out.shape[2]) else channels_apart(out)

    return run


def convolution_function(op: Operation) -> Change:
    """F.conv2d(x, W, b, ...) where any of the three may change."""
    x, weight = op.args[0], op.arg(1, "weight")
    names = (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
    options = [op.arg(3 + k, name, default) for k, (name, default) in enumerate(names)]
    run = lambda x, w: F.conv2d(x, w, None, *options)  # noqa: E731
    return _affine(op, run, x, weight, [*op.changes, None, None][:3], bias_axis=-3)


def linear_layer(op: Operation) -> Change:
    """W D without bias; a one-channel D meets the column W[:, c]."""
    weight = op.cached(("weight", op.d.data.dtype), lambda: op.module.weight.to(op.d.data.dtype))
    return Change(_apply_linear(weight, op.d, op.x))


def linear_function(op: Operation) -> Change:
    """F.linear(x, W, b) where any of the three may change."""
    return _affine(op, F.linear, op.args[0], op.arg(1, "weight"), [*op.changes, None, None][:3], bias_axis=-1)


def _affine(op: Operation, run: Callable, x: Tensor, weight: Tensor, changes: list, bias_axis: int) -> Change:
    """run(dx, W) + run(x, dW) + run(dx, dW) + db."""
    dx, dw = (None if c is None else c.dense(value) for c, value in zip(changes, (x, weight), strict=False))
    parts = []
    if dx is not None:
        parts.append(torch.vmap(run, (0, None))(dx, weight))
    if dw is not None:
        parts.append(torch.vmap(run, (None, 0))(x, dw))
    if dx is not None and dw is not None:
        parts.append(torch.vmap(run)(dx, dw))
    if changes[2] is not None:
        bias = changes[2].dense(op.arg(2, "bias"))
        shape = [1] * op.value.ndim
        shape[bias_axis] = -1
        parts.append(bias.reshape(len(bias), *shape))
    return Change(_expanded(sum(parts), op.value))


def _apply_linear(weight: Tensor, change: Change, x: Tensor) -> Tensor:
    if change.channel is not None and change.axis == x.ndim - 1:
        column = weight.t()[change.channel]  # [P, O]
        return change.data[..., None] * column.reshape(len(column), *[1] * (change.data.ndim - 1), -1)
    return F.linear(change.dense(x), weight)


# --- elementwise functions -----------------------------------------------------------------------------------------------


def elementwise(difference: Callable[..., Tensor]) -> Rule:
    """A rule from ``difference(op, x, d)`` = f(x + d) - f(x), element by element."""

    def rule(op: Operation) -> Change:
        return op.d.like(difference(op, op.d.of(op.x), op.d.data))

    return rule


def softmax(op: Operation) -> Change:
    """Softmax along the operation's axis."""
    return Change(softmax_change(op.x, op.value, op.d.dense(op.x), _softmax_dim(op)))


def log_softmax(op: Operation) -> Change:
    """Log-softmax along the operation's axis."""
    return Change(log_softmax_change(op.value, op.d.dense(op.x), _softmax_dim(op)))


def _softmax_dim(op: Operation) -> int:
    """The axis, counted from the end."""
    dim = op.module.dim if op.module is not None else op.arg(1, "dim")
    if dim is None:  # torch's legacy choice
        dim = 0 if op.x.ndim in (0, 1, 3) else 1
    return dim if dim < 0 else dim - op.x.ndim


def gelu(op: Operation) -> Change:
    """GELU, exact or by tanh."""
    kind = op.module.approximate if op.module is not None else op.kwargs.get("approximate", "none")
    return op.d.like((gelu_difference if kind == "none" else gelu_tanh_difference)(op.d.of(op.x), op.d.data))


def leaky_relu(op: Operation) -> Change:
    """slope d + (1 - slope) [relu(x + d) - relu(x)]."""
    slope = op.module.negative_slope if op.module is not None else op.arg(1, "negative_slope", 0.01)
    return op.d.like(slope * op.d.data + (1 - slope) * relu_difference(op.d.of(op.x), op.d.data))


# --- pooling by maximum --------------------------------------------------------------------------------------------------


def max_pool(op: Operation) -> Change:
    """max_i [(x_i - x_max) + D_i] over each window."""
    m = op.module
    names = (("kernel_size", None), ("stride", None), ("padding", 0), ("dilation", 1), ("ceil_mode", False))
    if m is not None:
        kernel, stride, padding, dilation, ceil = (getattr(m, name) for name, _ in names)
    else:
        kernel, stride, padding, dilation, ceil = (op.arg(k + 1, name, default) for k, (name, default) in enumerate(names))
    kernel, stride, padding, dilation = (_pair(v) for v in (kernel, stride or kernel, padding, dilation))
    sizes = zip(op.x.shape[-2:], op.value.shape[-2:], kernel, stride, padding, dilation, strict=True)
    # ceil_mode: a last window reaches beyond the padding
    bottom, right = (max(p, (m - 1) * s + d * (k - 1) + 1 - n - p if ceil else p) for n, m, k, s, p, d in sizes)
    border, window = (padding[1], right, padding[0], bottom), Window(kernel, stride, dilation)
    if not any(border):
        return _largest(op, lambda images, value: shifts(images, window))
    return _largest(op, lambda images, value: shifts(F.pad(images, border, value=value), window))


def adaptive_max_pool(op: Operation) -> Change:
    """As :func:`max_pool`, over windows of n / m pixels, rounded outwards where the output size m does not divide n."""
    sizes = list(zip(op.x.shape[-2:], op.value.shape[-2:], strict=True))
    if all(n % m == 0 for n, m in sizes):
        kernel = (sizes[0][0] // sizes[0][1], sizes[1][0] // sizes[1][1])
        return _largest(op, lambda images, value: shifts(images, Window(kernel, kernel, (1, 1))))
    rows, columns = (_adaptive_windows(n, m, op.x.device) for n, m in sizes)
    return _largest(op, lambda images, value: [images[..., r, :][..., c] for r in rows for c in columns])


def _adaptive_windows(n: int, m: int, device: torch.device) -> list[Tensor]:
    """For each position in a window the pixel that it sees of each window [m]; short windows see their last one again."""
    windows = [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
    widest = max(end - start for start, end in windows)
    return [torch.tensor([min(start + k, end - 1) for start, end in windows], device=device) for k in range(widest)]


def _largest(op: Operation, seen: Callable[[Tensor, float], list[Tensor]]) -> Change:
    """max_i [(x_i - x_max) + D_i]; ``seen(images [..., H, W], padding)`` is what each position in the window shows."""
    change = op.d if op.d.channel is None or op.d.axis < op.x.ndim - 2 else Change(op.d.dense(op.x))
    candidates = [change.of(x - op.value) + d for x, d in zip(seen(op.x, -math.inf), seen(change.data, 0.0), strict=True)]
    return change.like(functools.reduce(torch.maximum, candidates))


def _pair(value) -> tuple:
    return (value, value) if isinstance(value, int) or value is None else tuple(value)


# --- normalisation -------------------------------------------------------------------------------------------------------


def batch_norm(op: Operation) -> Change:
    """Batch statistics in train mode, an affine map per channel in eval mode; a one-channel change stays one-channel."""
    m, x, change = op.module, op.x, _along_channels(op)
    if not uses_batch_statistics(m):
        factor = _gamma(op) / (m.running_var.reshape([1, -1, *[1] * (x.ndim - 2)]) + m.eps).sqrt()
        return change.like(change.data * change.of(factor))
    mean_d, scale, shrink = op.cache.get("coefficients") or batch_coefficients(op)
    centred, _ = batch_statistics(op)
    return change.like((change.data - mean_d) * scale - change.of(centred) * shrink)


def _gamma(op: Operation) -> Tensor:
    """A BatchNorm layer's factors, [1, C, 1, ...]."""
    weight, ones = op.module.weight, [1] * (op.x.ndim - 2)
    return op.x.new_ones([1, op.x.shape[1], *ones]) if weight is None else weight.reshape([1, -1, *ones])


def uses_batch_statistics(m: nn.Module) -> bool:
    """Whether a BatchNorm layer normalises by the batch at hand."""
    return m.training or m.running_var is None


def batch_statistics(op: Operation) -> tuple[Tensor, Tensor]:
    """(x - mean, s) of a BatchNorm layer's input, once a batch."""
    return op.cached("statistics", lambda: statistics(op.x, [0, *range(2, op.x.ndim)], op.module.eps))


def batch_coefficients(op: Operation) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`coefficients` of a BatchNorm layer, the last two times its factor: in a pass of its own, which is faster."""
    change, (centred, s) = _along_channels(op), batch_statistics(op)
    dims = [1, *range(3, op.x.ndim + 1)] if change.channel is None else list(range(1, change.data.ndim))
    if change.means is None:
        mean_d, scale, shrink = coefficients(change.data, change.of(centred), change.of(s), dims)
    else:
        mean_d, scale, shrink = coefficients_of_means(*change.means[:, :, None, :, None, None], s)
    gamma = change.of(_gamma(op))
    return mean_d, scale * gamma, shrink * gamma


def _along_channels(op: Operation) -> Change:
    return op.d if op.d.channel is None or op.d.axis == 1 else Change(op.d.dense(op.x))


def layer_norm(op: Operation) -> Change:
    """Per-token statistics. Where weight w and bias b change too: Dn w + n Dw + Dn Dw + Db, n the normalised value."""
    shape, weight, _ = _layer_norm_options(op)
    (centred, s), dims, parts = layer_norm_statistics(op), list(range(-len(shape), 0)), []
    dw, db = ([*op.changes, None, None, None][k] for k in (2, 3)) if op.module is None else (None, None)
    if op.d is not None:
        out = normalised_change(op.d.dense(op.x), centred, s, dims)
        parts.append(out * weight if weight is not None else out)
    if dw is not None:
        dw = _aligned(dw.dense(weight), op.value)
        parts += [centred / s * dw] if op.d is None else [centred / s * dw, out * dw]
    if db is not None:
        parts.append(_aligned(db.dense(op.arg(3, "bias")), op.value))
    return Change(_expanded(sum(parts), op.value))


def layer_norm_statistics(op: Operation) -> tuple[Tensor, Tensor]:
    """(x - mean, s) of each token, once a batch."""
    shape, _, eps = _layer_norm_options(op)
    return op.cached("statistics", lambda: statistics(op.x, list(range(-len(shape), 0)), eps))


def _layer_norm_options(op: Operation) -> tuple:
    if op.module is not None:
        return op.module.normalized_shape, op.module.weight, op.module.eps
    return op.arg(1, "normalized_shape"), op.arg(2, "weight"), op.arg(4, "eps", 1e-5)


def group_norm(op: Operation) -> Change:
    """Statistics per sample and group of channels."""
    m, data = op.module, op.d.dense(op.x)
    centred, s = group_norm_statistics(op)
    dims = list(range(3, centred.ndim + 1))
    out = normalised_change(data.reshape(len(data), *centred.shape), centred, s, dims).reshape(data.shape)
    return Change(out if m.weight is None else out * m.weight.reshape(-1, *[1] * (op.x.ndim - 2)))


def group_norm_statistics(op: Operation) -> tuple[Tensor, Tensor]:
    """(x - mean [B, groups, C / groups, ...], s) of each sample and group, once a batch."""
    grouped = lambda: op.x.reshape(op.x.shape[0], op.module.num_groups, -1, *op.x.shape[2:])  # noqa: E731
    return op.cached("statistics", lambda: statistics(grouped(), list(range(2, op.x.ndim + 1)), op.module.eps))


# --- which rule serves which operation -------------------------------------------------------------------------------------

_relu = elementwise(lambda op, x, d: relu_difference(x, d))
_sigmoid = elementwise(lambda op, x, d: sigmoid_difference(x, d))
_tanh = elementwise(lambda op, x, d: tanh_difference(x, d))
_silu = elementwise(lambda op, x, d: silu_difference(x, d))
_relu6 = elementwise(lambda op, x, d: clamp_difference(x, d, 0.0, 6.0))
_exp = elementwise(lambda op, x, d: exp_difference(x, d))
_square = elementwise(lambda op, x, d: d * (2 * x + d))
_neg = elementwise(lambda op, x, d: -d)

MODULES: dict[type, Rule] = {
    nn.Conv2d: convolution, nn.Linear: linear_layer, nn.LayerNorm: layer_norm, nn.GroupNorm: group_norm,
    nn.BatchNorm1d: batch_norm, nn.BatchNorm2d: batch_norm, nn.BatchNorm3d: batch_norm,
    nn.ReLU: _relu, nn.ReLU6: _relu6, nn.LeakyReLU: leaky_relu, nn.GELU: gelu, nn.SiLU: _silu, nn.Sigmoid: _sigmoid,
    nn.Tanh: _tanh, nn.Softmax: softmax, nn.LogSoftmax: log_softmax, nn.MaxPool2d: max_pool,
    nn.AdaptiveMaxPool2d: adaptive_max_pool, nn.AvgPool2d: average_pool,
    nn.AdaptiveAvgPool2d: average_pool, nn.Flatten: linear_map, nn.Unflatten: linear_map, nn.Identity: identity,
    nn.Dropout: dropout, nn.Dropout2d: dropout, nn.ZeroPad2d: linear_map,
}  # fmt: skip

FUNCTIONS: dict[str, Rule] = {
    "add": add, "sub": sub, "mul": product, "multiply": product, "truediv": quotient, "div": quotient, "neg": _neg,
    "matmul": bilinear, "bmm": bilinear, "linear": linear_function, "scaled_dot_product_attention": attention,
    "cat": cat, "concat": cat, "pad": pad, "getitem": getitem, "chunk": split, "split": split, "unbind": split,
    "mean": mean, "sum": linear_map, "flatten": linear_map, "reshape": linear_map, "view": view,
    "permute": linear_map, "transpose": linear_map, "t": linear_map, "squeeze": linear_map, "unsqueeze": linear_map,
    "expand": linear_map, "movedim": linear_map, "contiguous": identity, "unflatten": linear_map,
    "relu": _relu, "relu6": _relu6, "leaky_relu": leaky_relu, "gelu": gelu, "silu": _silu, "sigmoid": _sigmoid,
    "tanh": _tanh, "softmax": softmax, "log_softmax": log_softmax, "exp": _exp, "square": _square, "avg_pool2d": average_pool,
    "adaptive_avg_pool2d": average_pool, "max_pool2d": max_pool,
    "adaptive_max_pool2d": adaptive_max_pool, "layer_norm": layer_norm, "dropout": dropout, "conv2d": convolution_function,
}  # fmt: skip

BY_FUNCTION = {
    getattr(home, name): rule
    for name, rule in FUNCTIONS.items()
    for home in (torch, F, operator)
    if callable(getattr(home, name, None))
}

#: elementwise or nearly so: the compiler merges a run of these into few passes over memory
FUSABLE = {
    add, sub, product, quotient, mean, identity, leaky_relu, gelu, max_pool, adaptive_max_pool, batch_norm,
    layer_norm, group_norm, softmax, log_softmax, average_pool, dropout, _relu, _sigmoid, _tanh, _silu, _relu6, _exp,
    _square, _neg,
}  # fmt: skip

#: evaluated in the type that changes travel in; all others compute in the parameters' type
NATIVE = {convolution, linear_layer, linear_map, view, split, getitem, identity, dropout, pad}

#: these compare base values with each other or need their sum, so that rounding them would change the answer
SHARP = {max_pool, adaptive_max_pool, _relu6, softmax, log_softmax}

#: which side of a kink a base value lies on decides what becomes of a change, however small
KINKED = {_relu, _relu6, leaky_relu, max_pool, adaptive_max_pool}

#: more than the first input may change
SEVERAL = {add, sub, product, quotient, bilinear, attention, cat, getitem, linear_function, convolution_function, layer_norm}

#: what a normalisation needs to know of its base input
STATISTICS = {batch_norm: batch_statistics, layer_norm: layer_norm_statistics, group_norm: group_norm_statistics}


def find(node: fx.Node, module: nn.Module | None) -> Rule:
    """The rule of an operation; :func:`fallback` where there is none, or where the user's hooks change what torch does."""
    if node.op == "call_module":
        hooked = module is not None and (module._forward_hooks or module._forward_pre_hooks)
        return fallback if hooked else MODULES.get(type(module), fallback)
    if node.kwargs.get("rounding_mode") or node.kwargs.get("enable_gqa"):
        return fallback
    if node.op == "call_method":
        return FUNCTIONS.get(node.target, fallback)
    return BY_FUNCTION.get(node.target, fallback)
