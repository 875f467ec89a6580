"""The change that a parameter's own operation makes when one coordinate moves: where every chunk begins.

| parameter | change of the operation's output for mu e_j |
|---|---|
| convolution weight (o, i, kh, kw) | mu x_i shifted by (kh, kw), strided and padded as the convolution, on channel o |
| linear weight (o, i) | mu x_i on feature o |
| weight c of a normalisation | mu times the normalised x_c, on channel c |
| bias c | mu on channel c |
| a parameter used by itself | mu at its place |
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dzhpc.engines import rules
from dzhpc.engines.changes import Change, Operation


def seed(op: Operation, name: str, local: np.ndarray, mu: float) -> Change | None:
    """Change of the output for mu e_j on parameter ``name`` of ``op.module``, j in ``local`` [P]; None where no rule is known."""
    rule = SEEDS.get((type(op.module), name))
    return rule(op, np.unravel_index(local, getattr(op.module, name).shape), mu) if rule else None


def of_parameter(parameter: Tensor, local: np.ndarray, mu: float) -> Change:
    """The change of a parameter that the network reads by itself."""
    data = parameter.new_zeros(len(local), parameter.numel())
    data[torch.arange(len(local), device=data.device), _index(local, data)] = mu
    return Change(data.view(len(local), *parameter.shape))


def _index(places: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(places)).to(like.device)


def _conv_weight(op: Operation, place: tuple[np.ndarray, ...], mu: float) -> Change:
    conv = op.module
    out_channel, in_channel, kh, kw = place
    in_channel = in_channel + out_channel // (conv.out_channels // conv.groups) * (conv.in_channels // conv.groups)
    seen = op.cached("shifts", lambda: _all_shifts(conv, op.x))
    position = kh * conv.kernel_size[1] + kw
    data = op.x.new_empty(len(position), *seen[0].shape[1:])
    for k in np.unique(position):  # as many as the kernel has positions, not coordinates
        here = np.nonzero(position == k)[0]
        data[_index(here, data)] = seen[k][_index(in_channel[here], data)]
    return Change(data.mul_(mu), _index(out_channel, data), 1)


def _all_shifts(conv: nn.Conv2d, x: Tensor) -> list[Tensor]:
    """x as each kernel position sees it, [C, B, H', W'] each."""
    padded = rules.padded(x, rules.borders(conv), conv.padding_mode)
    return rules.shifts(padded.transpose(0, 1).contiguous(), rules.window_of(conv))


def _linear_weight(op: Operation, place: tuple[np.ndarray, ...], mu: float) -> Change:
    features = op.cached("features", lambda: op.x.movedim(-1, 0).contiguous())
    return Change(mu * features[_index(place[1], op.x)], _index(place[0], op.x), op.x.ndim - 1)


def _bias(axis: int) -> Callable:
    """mu on one channel."""

    def rule(op: Operation, place: tuple[np.ndarray, ...], mu: float) -> Change | None:
        if len(place) > 1:  # a LayerNorm over several axes
            return None
        k = axis % op.value.ndim
        shape = [n for i, n in enumerate(op.value.shape) if i != k]
        return Change(op.value.new_full((len(place[0]), *shape), mu), _index(place[0], op.value), k)

    return rule


def _scale(axis: int) -> Callable:
    """mu times the normalised input on one channel."""

    def rule(op: Operation, place: tuple[np.ndarray, ...], mu: float) -> Change | None:
        if len(place) > 1:
            return None
        k = axis % op.value.ndim
        normalised = op.cached("normalised", lambda: _without_affine(op.module, op.x).movedim(k, 0).contiguous())
        channel = _index(place[0], op.x)
        return Change(mu * normalised[channel], channel, k)

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


SEEDS: dict[tuple[type, str], Callable] = {(nn.Conv2d, "weight"): _conv_weight, (nn.Linear, "weight"): _linear_weight}
for _kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm):
    SEEDS[_kind, "weight"], SEEDS[_kind, "bias"] = _scale(1), _bias(1)
SEEDS[nn.LayerNorm, "weight"], SEEDS[nn.LayerNorm, "bias"] = _scale(-1), _bias(-1)
SEEDS[nn.Conv2d, "bias"], SEEDS[nn.Linear, "bias"] = _bias(1), _bias(-1)
