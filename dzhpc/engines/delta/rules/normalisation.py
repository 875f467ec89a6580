"""Normalisation: by the batch, by tokens, by groups of channels."""

from torch import Tensor, nn

from dzhpc.engines.delta.change import Change, Operation
from dzhpc.engines.delta.differences import coefficients, coefficients_of_means, normalised_change, statistics
from dzhpc.engines.delta.rules.products import aligned, expanded


def batch_norm(op: Operation) -> Change:
    """Batch statistics in train mode, an affine map per channel in eval mode; a one-channel change stays one-channel."""
    m, x, change = op.module, op.x, _along_channels(op)
    if not uses_batch_statistics(m):
        factor = _gamma(op) / (m.running_var.reshape([1, -1, *[1] * (x.ndim - 2)]) + m.eps).sqrt()
        return change.like(change.data * change.of(factor))
    mean_d, scale, shrink = op.cache.get("sums") or batch_sums(op)
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


def batch_sums(op: Operation) -> tuple[Tensor, Tensor, Tensor]:
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
        dw = aligned(dw.dense(weight), op.value)
        parts += [centred / s * dw] if op.d is None else [centred / s * dw, out * dw]
    if db is not None:
        parts.append(aligned(db.dense(op.arg(3, "bias")), op.value))
    return Change(expanded(sum(parts), op.value))


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
    out = normalised_change(data.reshape(data.shape[0], *centred.shape), centred, s, dims).reshape(data.shape)
    return Change(out if m.weight is None else out * m.weight.reshape(-1, *[1] * (op.x.ndim - 2)))


def group_norm_statistics(op: Operation) -> tuple[Tensor, Tensor]:
    """(x - mean [B, groups, C / groups, ...], s) of each sample and group, once a batch."""
    grouped = lambda: op.x.reshape(op.x.shape[0], op.module.num_groups, -1, *op.x.shape[2:])  # noqa: E731
    return op.cached("statistics", lambda: statistics(grouped(), list(range(2, op.x.ndim + 1)), op.module.eps))
