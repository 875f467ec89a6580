"""A forward pass that is watched while it runs: which of its values follow from the input, which from parameters alone.

It sees what the network calls, ``torch.nn.functional`` and methods of tensors, whatever their order: nothing is traced.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from dzhpc.errors import InputError

#: linear maps of what flows through the network, by a weight
LAYERS = {
    "linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "matmul",
    "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "einsum", "tensordot", "addmm", "baddbmm", "addbmm",
}  # fmt: skip
#: elementwise, and without weights
ACTIVATIONS = {
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "softsign", "tanh", "sigmoid",
    "hardtanh", "hardsigmoid", "hardswish", "logsigmoid", "hardshrink", "softshrink", "tanhshrink", "threshold", "sin", "cos",
}  # fmt: skip
#: what may take a weight of several axes without being a layer: the error passes it as by back-propagation
EXACT = {
    "add", "iadd", "radd", "sub", "isub", "rsub", "cat", "concat", "stack", "layer_norm", "group_norm", "rms_norm", "where",
    "expand_as", "view_as", "reshape_as", "type_as", "to", "embedding", "broadcast_tensors", "getitem", "setitem",
}  # fmt: skip


class Followed(TorchFunctionMode):
    """Within, each operation on values that follow from ``inputs`` goes through :meth:`operation`. For one pass.

    model: in which state it is run. other: a tensor of the same shape for each parameter; what is computed from parameters alone
    is computed from these, too. name: of the method, for errors.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, name: str, other: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.name, self.layers = name, 0  # layers that were passed so far
        own = dict(model.named_parameters())
        self._weights = {id(p): (p, other[key].detach() if other else None) for key, p in own.items()}
        self._data: dict[int, tuple[Tensor, object]] = {id(inputs): (inputs, self.first(inputs))}  # a tensor, what is known of it

    def first(self, inputs: Tensor) -> object:
        """What is known of the input."""
        return None

    def operation(self, func: Callable, args: tuple, kwargs: dict, data: list[Tensor], weighted: bool) -> object:
        """What ``func`` gives, one of whose arguments is among ``data``; :meth:`note` says what is known of a result.

        weighted: whether parameters are among the arguments, too.
        """
        return func(*args, **kwargs)

    def note(self, tensor: Tensor, known: object) -> None:
        """Remember what is known of a value that follows from the input."""
        self._data[id(tensor)] = tensor, known

    def known(self, tensor: Tensor) -> object:
        """What was noted of a value."""
        return self._data[id(tensor)][1]

    def is_data(self, value: object) -> bool:
        """Whether a value follows from the input."""
        return id(value) in self._data

    def replaced(self, given: object, data: Callable[[Tensor], Tensor], weights: bool = False) -> object:
        """Arguments with ``data(x)`` in place of each x that follows from the input, and the other weights if ``weights``."""

        def of(value: object) -> object:
            if self.is_data(value):
                return data(value)
            return self._weights[id(value)][1] if weights and id(value) in self._weights else value

        return tree_map(of, given)

    def outputs(self, outputs: object) -> Tensor:
        """The network's outputs. Raises InputError where they were not seen to follow from the input."""
        if not self.is_data(outputs):
            self.refuse(f"cannot follow how the network makes its output, {type(outputs).__name__}")
        return outputs

    def refuse(self, what: str) -> None:
        """Raise InputError."""
        raise InputError(f'zo.estimator = "{self.name}": {what}')

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        data = list({id(t): t for t in tensors if self.is_data(t)}.values())
        weights = [t for t in tensors if id(t) in self._weights]
        if not data:
            return self._without_data(func, args, kwargs, bool(weights))
        name = name_of(func)
        for t in tensors:
            if t.grad_fn is not None and not self.is_data(t) and id(t) not in self._weights:
                self.refuse(f"cannot follow how the network makes what it gives to {name}")
        matrix = any(sum(n > 1 for n in w.shape) > 1 for w in weights)
        if matrix and name not in LAYERS | EXACT and not name.endswith(("_norm", "__get__", "__set__")):
            self.refuse(f"{name} is no layer that it knows; it knows linear maps, convolutions, products of matrices")
        self.layers += matrix and name in LAYERS
        out = self.operation(func, args, kwargs, data, bool(weights))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and not self.is_data(value):
                self.note(value, None)
        return out

    def _without_data(self, func: Callable, args: tuple, kwargs: dict, weighted: bool) -> object:
        """An operation on parameters and constants; what it makes of parameters is a weight itself."""
        out = func(*args, **kwargs)
        if weighted and isinstance(out, Tensor) and id(out) not in self._weights:
            twin = self.replaced((args, kwargs), lambda x: x, weights=True)
            known = next(iter(self._weights.values()))[1] is not None
            with torch.no_grad():
                self._weights[id(out)] = out, func(*twin[0], **twin[1]) if known else None
        return out


def name_of(func: Callable) -> str:
    """``relu`` for ``torch.relu``, ``torch.nn.functional.relu``, ``Tensor.relu_``; ``add`` for ``Tensor.__add__``."""
    name = getattr(func, "__name__", str(func))
    return name if name in ("__get__", "__set__", *LAYERS) else name.strip("_")


def layers_of(model: nn.Module, inputs: Tensor, name: str) -> int:
    """How many layers a pass goes through; buffers and random numbers are left as they were. Raises InputError."""
    buffers = [b.clone() for b in model.buffers()]
    with torch.no_grad(), torch.random.fork_rng():
        with (mode := Followed(model, inputs, name)):
            model(inputs)
        for b, value in zip(model.buffers(), buffers, strict=True):
            b.copy_(value)
    return mode.layers


class Both(torch.autograd.Function):
    """The value of the first tensor, bit for bit; the gradient goes to both."""

    @staticmethod
    def forward(ctx, value: Tensor, other: Tensor) -> Tensor:
        """A copy, so that it may be overwritten."""
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """As it comes, twice."""
        return gradient, gradient
