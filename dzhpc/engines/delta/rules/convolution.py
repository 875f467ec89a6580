"""Convolutions and linear layers: linear in a change, so that it passes without their bias."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dzhpc.engines.delta.change import Change, Operation
from dzhpc.engines.delta.layout import channels_apart, channels_last, fills_vectors, is_apart
from dzhpc.engines.delta.rules.products import expanded
from dzhpc.engines.kernels.library import BATCH, direct_weights
from dzhpc.engines.kernels.plain import Torch
from dzhpc.engines.windows import Border, Window, borders, padded, shifts, window_of

MANY = 16  # images from which on torch leaves a convolution of 1 x 1 to oneDNN, twice as fast as its linear layers on AVX-512


def convolution(op: Operation, centred: Callable[[], Tensor] | None = None) -> Change:
    """W * D without bias; a one-channel D meets W[:, c] only.

    centred: of the outputs, where a BatchNorm behind would take means of the change; given where the kernel knows them.
    """
    conv = op.module
    if op.d.channel is not None and op.d.axis == 1 and op.x.ndim == 4 and conv.groups == 1:
        border, window = borders(conv), window_of(conv)
        columns = conv.weight.flatten(2)[:, op.d.channel].permute(1, 2, 0).contiguous()  # [P, k*k, O]
        if op.kernels is None:
            return Change(by_product(padded(op.d.data, border, conv.padding_mode), columns, window))
        return Change(op.kernels.call(_by_sum(window, border, conv.padding_mode), op.d.data, columns))
    data = op.d.dense(op.x)
    kernel = op.kernels.find("conv2d", conv, data) if op.kernels else Torch()
    if op.kernels and isinstance(kernel, Torch) and is_apart(data):
        data = op.kernels.call(channels_last, data)
    weights = op.cached((kernel.name, data.dtype), lambda: kernel.weights(conv, data.dtype))
    out, means = kernel.convolve(conv, data, weights, centred)
    return Change(out, means=means)


def by_product(padded: Tensor, columns: Tensor, window: Window) -> Tensor:
    """[P, B, H, W], [P, k*k, O] -> [P, B, O, H', W']: the shifted copies of D as rows of a matrix product with W[:, c]."""
    rows = torch.stack(shifts(padded, window), dim=-1)
    out = torch.bmm(rows.flatten(1, 3), columns)
    return out.unflatten(1, rows.shape[1:4]).permute(0, 1, 4, 2, 3)


@functools.cache
def _by_sum(window: Window, border: Border, mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    """As :func:`by_product`, as a sum over kernel positions: a compiler makes one pass of it, three times faster in fp32."""

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
    d, m = op.d.data, op.module
    if (
        op.kernels
        and op.kernels.library
        and op.d.channel is None
        and d.ndim == 3
        and d.shape[1] >= BATCH
        and d.dtype == torch.float32
    ):
        weights = op.cached("direct", lambda: direct_weights(m.weight[..., None, None]))
        images, point = d[..., None, None], Window((1, 1), (1, 1), (1, 1))
        return Change(
            op.kernels.library.convolve(images, weights, m.out_features, point, (0, 0, 0, 0), None, "direct")[0].flatten(2)
        )
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
        parts.append(bias.reshape(bias.shape[0], *shape))
    return Change(expanded(sum(parts), op.value))


def _apply_linear(weight: Tensor, change: Change, x: Tensor) -> Tensor:
    if change.channel is not None and change.axis == x.ndim - 1:
        column = weight.t()[change.channel]  # [P, O]
        return change.data[..., None] * column.reshape(column.shape[0], *[1] * (change.data.ndim - 1), -1)
    data = change.dense(x).contiguous()  # else one coordinate is another product
    if x.ndim < 3 or len(x) < MANY or data.dtype != torch.float32 or data.device.type != "cpu":
        return F.linear(data, weight)
    images = data.flatten(0, 1).flatten(1, -2)[:, :, None].movedim(-1, 1)
    return F.conv2d(images, weight[..., None, None]).movedim(1, -1).reshape(*data.shape[:-1], -1)
