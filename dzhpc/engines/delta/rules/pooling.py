"""Pooling: averages, and maxima over windows."""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dzhpc.engines.delta.change import Change, Operation
from dzhpc.engines.delta.rules.structure import linear_map
from dzhpc.engines.windows import Window, shifts


def average_pool(op: Operation) -> Change:
    """An average over windows of images [B, C, H, W]: applied to all P B of them; a one-channel change stays one-channel."""
    if op.x.ndim != 4:
        return linear_map(op)
    run = lambda images: op.run((images, *op.args[1:]), op.kwargs)  # noqa: E731
    if op.d.channel is not None and op.d.axis == 1:
        return op.d.like(run(op.d.data.flatten(0, 1)[:, None])[:, 0].unflatten(0, op.d.data.shape[:2]))
    data = op.d.dense(op.x)
    return Change(run(data.flatten(0, 1)).unflatten(0, data.shape[:2]))


def max_pool(op: Operation) -> Change:
    """max_i [(x_i - x_max) + D_i] over each window."""
    kernel, stride, padding, dilation, ceil = _options(op)
    sizes = zip(op.x.shape[-2:], op.value.shape[-2:], kernel, stride, padding, dilation, strict=True)
    # ceil_mode: a last window reaches beyond the padding
    bottom, right = (max(p, (m - 1) * s + d * (k - 1) + 1 - n - p if ceil else p) for n, m, k, s, p, d in sizes)
    border, window = (padding[1], right, padding[0], bottom), Window(kernel, stride, dilation)
    if not any(border):
        return _largest(op, lambda images, value: shifts(images, window))
    return _largest(op, lambda images, value: shifts(F.pad(images, border, value=value), window))


def plain_size(op: Operation) -> int:
    """Of square windows that lie side by side and cover an image from its corner; 0 where they do not."""
    kernel, stride, padding, dilation, ceil = _options(op)
    plain = kernel[0] == kernel[1] and stride == kernel and padding == (0, 0) and dilation == (1, 1) and not ceil
    return kernel[0] if plain else 0


def _options(op: Operation) -> tuple:
    """A max pool's (kernel, stride, padding, dilation, ceil_mode), the first four as (vertical, horizontal)."""
    m = op.module
    names = (("kernel_size", None), ("stride", None), ("padding", 0), ("dilation", 1), ("ceil_mode", False))
    if m is not None:
        kernel, stride, padding, dilation, ceil = (getattr(m, name) for name, _ in names)
    else:
        kernel, stride, padding, dilation, ceil = (op.arg(k + 1, name, default) for k, (name, default) in enumerate(names))
    return *(_pair(v) for v in (kernel, stride or kernel, padding, dilation)), ceil


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
    widest = max(-(-(i + 1) * n // m) - i * n // m for i in range(m))
    i = torch.arange(m, device=device)  # made where it is used: nothing travels to a GPU
    start, end = i * n // m, ((i + 1) * n + m - 1) // m
    return [torch.minimum(start + k, end - 1) for k in range(widest)]


def _largest(op: Operation, seen: Callable[[Tensor, float], list[Tensor]]) -> Change:
    """max_i [(x_i - x_max) + D_i]; ``seen(images [..., H, W], padding)`` is what each position in the window shows."""
    change = op.d if op.d.channel is None or op.d.axis < op.x.ndim - 2 else Change(op.d.dense(op.x))
    candidates = [change.of(x - op.value) + d for x, d in zip(seen(op.x, -math.inf), seen(change.data, 0.0), strict=True)]
    return change.like(functools.reduce(torch.maximum, candidates))


def _pair(value) -> tuple:
    return (value, value) if isinstance(value, int) or value is None else tuple(value)
