"""The change that a parameter's own operation makes when one coordinate moves: where every chunk begins.

| parameter | change of the operation's output for mu e_j |
|---|---|
| convolution weight (o, i, kh, kw) | mu x_i shifted by (kh, kw), strided and padded as the convolution, on channel o |
| linear weight (o, i) | mu x_i on feature o |
| weight c of a normalisation | mu times the normalised x_c, on channel c |
| bias c | mu on channel c |
| a parameter used by itself | mu at its place |

A layer of one's own joins by ``ORIGINS[MyLayer, "weight"] = function``: (operation, place, mu) -> :class:`Origin`, or None where
it cannot; place: indices into the parameter, a tensor [P] an axis; mu: a tensor without axes.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dzhpc.engines.delta.change import Operation, Origin
from dzhpc.engines.delta.layout import channels_apart
from dzhpc.engines.kernels.library import Planes
from dzhpc.engines.windows import borders, padded, seen, window_of
from dzhpc.method.arrays import on_device


def of_module(op: Operation, name: str, parameter: Tensor, local: np.ndarray, mu: float) -> Origin | None:
    """What mu e_j on a parameter of ``op.module`` does to the output, j in ``local`` [P]; None where no rule is known."""
    hooked = op.module._forward_hooks or op.module._forward_pre_hooks  # what they do is not known
    rule = None if hooked else ORIGINS.get((type(op.module), name))
    if rule is None:
        return None
    place = np.array(np.unravel_index(local, parameter.shape))
    found = rule(op, list(on_device(place, op.value.device).unbind()), op.value.new_full((), mu))
    if found:
        found.name = name
        if found.source:
            found.source.factor = mu
    return found


def of_parameter(parameter: Tensor, local: np.ndarray, mu: float) -> Origin:
    """What mu e_j does to a parameter that the network reads by itself."""

    def make(place: Tensor, mu: Tensor) -> Tensor:
        ones = place[:, None] == torch.arange(parameter.numel(), device=place.device)
        return (ones * mu).reshape(-1, *parameter.shape)

    return Origin(make, [on_device(local, parameter.device), parameter.new_full((), mu)], None)


def _conv_weight(op: Operation, place: list[Tensor], mu: Tensor) -> Origin | None:
    conv = op.module
    if op.x.ndim != 4:  # one image without a batch axis
        return None
    out_channel, in_channel, kh, kw = place
    if conv.groups > 1:
        in_channel = in_channel + out_channel // (conv.out_channels // conv.groups) * (conv.in_channels // conv.groups)
    images = op.cached("padded", lambda: _apart(padded(op.x, borders(conv), conv.padding_mode)))
    window = window_of(conv)

    def make(images: Tensor, i: Tensor, kh: Tensor, kw: Tensor, mu: Tensor) -> Tensor:
        return seen(images, window)[i, kh, kw] * mu

    return Origin(
        make,
        [images, in_channel, kh, kw, mu],
        out_channel,
        source=_planes(seen(images, window), [in_channel, kh, kw], out_channel),
    )


def _linear_weight(op: Operation, place: list[Tensor], mu: Tensor) -> Origin:
    features = op.cached("features", lambda: op.x.movedim(-1, 0).contiguous())
    return Origin(lambda features, i, mu: features[i] * mu, [features, place[1], mu], place[0], op.value.ndim - 1)


def _bias(axis: int) -> Callable:
    """mu on one channel, or at one place of a LayerNorm over several axes."""

    def rule(op: Operation, place: list[Tensor], mu: Tensor) -> Origin:
        if len(place) > 1:
            shape, inner = op.value.shape, op.module.bias.shape
            return Origin(lambda mu, *place: (_at(place, inner, len(shape)) * mu).expand(-1, *shape), [mu, *place], None)
        k = axis % op.value.ndim
        shape = [n for i, n in enumerate(op.value.shape) if i != k]
        planes = None
        if k == 1 and op.value.ndim == 4:
            planes = _planes(op.value.new_ones(shape[0]).view(1, -1, 1, 1).expand(1, *shape), [0 * place[0]], place[0])
        return Origin(lambda mu, c: mu.expand(c.shape[0], *shape), [mu, place[0]], place[0], k, source=planes, constant=True)

    return rule


def _scale(axis: int) -> Callable:
    """mu times the normalised input on one channel, or at one place of a LayerNorm over several axes."""

    def rule(op: Operation, place: list[Tensor], mu: Tensor) -> Origin:
        if len(place) > 1:
            x, inner = op.cached("normalised", lambda: _without_affine(op.module, op.x)), op.module.weight.shape
            return Origin(lambda x, mu, *place: _at(place, inner, x.ndim) * x * mu, [x, mu, *place], None)
        k = axis % op.value.ndim
        normalised = op.cached("normalised", lambda: _apart(_without_affine(op.module, op.x), k))
        planes = _planes(normalised, place, place[0]) if k == 1 and op.x.ndim == 4 else None
        return Origin(lambda normalised, c, mu: normalised[c] * mu, [normalised, place[0], mu], place[0], k, source=planes)

    return rule


def _planes(images: Tensor, place: list[Tensor], channel: Tensor) -> Planes | None:
    """images[place] [P, B, H, W] of ``images`` [*axes of place, B, H, W], on a CPU and with the batch innermost in memory."""
    *outer, batch, row, column = images.stride()
    if images.device.type != "cpu" or images.dtype != torch.float32 or batch != 1:
        return None
    offsets = functools.reduce(torch.add, map(torch.mul, place, outer))
    return Planes(images, offsets, row, column, *images.shape[-2:], channel=channel)


def _at(place: tuple[Tensor, ...], shape: torch.Size, ndim: int) -> Tensor:
    """Where each place [P] of the last axes is: [P, 1, ..., *shape], true at one place."""
    here = torch.ones([place[0].shape[0], *[1] * ndim], dtype=torch.bool, device=place[0].device)
    for k, (index, n) in enumerate(zip(place, shape, strict=True)):
        axis = [1] * ndim
        axis[ndim - len(shape) + k] = n
        here = here & (index.reshape(index.shape[0], *[1] * ndim) == torch.arange(n, device=index.device).reshape(axis))
    return here


def _apart(x: Tensor, axis: int = 1) -> Tensor:
    """x with its channels first."""
    return channels_apart(x).movedim(1, 0) if x.ndim == 4 and axis == 1 else x.movedim(axis, 0).contiguous()


def _without_affine(m: nn.Module, x: Tensor) -> Tensor:
    """x normalised as the layer does it, before weight and bias; no running statistic moves."""
    if isinstance(m, nn.LayerNorm):
        return F.layer_norm(x, m.normalized_shape, eps=m.eps)
    if isinstance(m, nn.GroupNorm):
        return F.group_norm(x, m.num_groups, eps=m.eps)
    if m.training or m.running_var is None:
        return F.batch_norm(x, None, None, training=True, eps=m.eps)
    return F.batch_norm(x, m.running_mean, m.running_var, eps=m.eps)


ORIGINS: dict[tuple[type, str], Callable] = {(nn.Conv2d, "weight"): _conv_weight, (nn.Linear, "weight"): _linear_weight}
for _kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm):
    ORIGINS[_kind, "weight"], ORIGINS[_kind, "bias"] = _scale(1), _bias(1)
ORIGINS[nn.LayerNorm, "weight"], ORIGINS[nn.LayerNorm, "bias"] = _scale(-1), _bias(-1)
ORIGINS[nn.Conv2d, "bias"], ORIGINS[nn.Linear, "bias"] = _bias(-3), _bias(-1)
