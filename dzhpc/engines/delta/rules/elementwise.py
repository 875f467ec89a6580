"""Functions of single values, and softmax along an axis."""

from collections.abc import Callable

from torch import Tensor

from dzhpc.engines.delta.change import Change, Operation
from dzhpc.engines.delta.differences import (
    clamp_difference,
    exp_difference,
    gelu_difference,
    gelu_tanh_difference,
    log_softmax_change,
    relu_difference,
    sigmoid_difference,
    silu_difference,
    softmax_change,
    tanh_difference,
)


def elementwise(difference: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Operation], Change]:
    """A rule's function from ``difference(x, d)`` = f(x + d) - f(x), element by element."""

    def rule(op: Operation) -> Change:
        return op.d.like(difference(op.d.of(op.x), op.d.data))

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


relu = elementwise(relu_difference)
relu6 = elementwise(lambda x, d: clamp_difference(x, d, 0.0, 6.0))
sigmoid = elementwise(sigmoid_difference)
tanh = elementwise(tanh_difference)
silu = elementwise(silu_difference)
exp = elementwise(exp_difference)
square = elementwise(lambda x, d: d * (2 * x + d))
neg = elementwise(lambda x, d: -d)
