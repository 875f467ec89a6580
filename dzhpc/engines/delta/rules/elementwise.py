"""Functions of single values, and softmax along an axis."""

from collections.abc import Callable

import torch
from torch import Tensor

from dzhpc.engines.delta.change import Change, Operation
from dzhpc.engines.delta.differences import (
    clamp_difference,
    exp_difference,
    gelu_difference,
    gelu_difference_by_tables,
    gelu_tables,
    gelu_tanh_difference,
    log_softmax_change,
    relu_difference,
    sigmoid_difference,
    silu_difference,
    tanh_difference,
)
from dzhpc.engines.delta.rules.products import softened


def elementwise(difference: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Operation], Change]:
    """A rule's function from ``difference(x, d)`` = f(x + d) - f(x), element by element."""

    def rule(op: Operation) -> Change:
        return op.d.like(difference(op.d.of(op.x), op.d.data))

    return rule


def softmax(op: Operation) -> Change:
    """Softmax along the operation's axis."""
    return Change(softened(op.kernels, op.x, op.value, op.d.dense(op.x), _softmax_dim(op)))


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
    if tables := op.cached("tables", lambda: gelu_base(op)):
        return op.d.like(gelu_difference_by_tables(op.d.of(op.x), *map(op.d.of, tables), op.d.data))
    return op.d.like((gelu_difference if _is_exact_gelu(op) else gelu_tanh_difference)(op.d.of(op.x), op.d.data))


def gelu_base(op: Operation) -> tuple[Tensor, ...]:
    """Tables of a GELU's base values, where there are any; float64 is for comparisons, and takes the longer way."""
    return gelu_tables(op.x) if _is_exact_gelu(op) and op.x.dtype == torch.float32 else ()


def _is_exact_gelu(op: Operation) -> bool:
    return (op.module.approximate if op.module is not None else op.kwargs.get("approximate", "none")) == "none"


def leaky_relu(op: Operation) -> Change:
    """slope d + (1 - slope) [relu(x + d) - relu(x)]."""
    slope = op.module.negative_slope if op.module is not None else op.arg(1, "negative_slope", 0.01)
    return op.d.like(slope * op.d.data + (1 - slope) * relu_difference(op.d.of(op.x), op.d.data))


relu = elementwise(relu_difference)
relu6 = elementwise(lambda x, d: clamp_difference(x, d, 0.0, 6.0))
sigmoid = elementwise(sigmoid_difference)
tanh = elementwise(tanh_difference)
silu = elementwise(silu_difference)
exp = elementwise(exp_difference)
square = elementwise(lambda x, d: d * (2 * x + d))
neg = elementwise(lambda x, d: -d)
