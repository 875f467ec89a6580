"""Engine ``full``: the whole model for every query. The reference that the others are compared with."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dzhpc.errors import InputError
from dzhpc.method.coordinates import ParameterIndex, cut

CHUNK = 4  # coordinates between two looks at the clock; they are evaluated one at a time all the same


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits [B, K] against labels [B], summed in float64: the loss changes by 1e-5 of itself."""
    return F.cross_entropy(outputs.double(), targets)


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error over all elements, summed in float64."""
    return F.mse_loss(outputs.double(), targets.double())


LOSSES = {"cross_entropy": cross_entropy, "mse": mse}


def checked(coords) -> list[int]:
    """Coordinates as integers. Raises InputError for anything else: a mask of booleans is not a list of indices."""
    array = np.asarray(coords)
    if array.size and array.dtype.kind not in "iu":
        raise InputError(f"coordinates must be integers, found {array.dtype}")
    return [int(j) for j in array]


class Full:
    """Evaluates l(theta + mu e_j) - l(theta) by running the model once per coordinate.

    Between calls every parameter, buffer and RNG state is bit for bit what it was; only :meth:`bind` moves buffers such as
    BatchNorm's running statistics, once. Every query sees the buffers and the random numbers that the base pass saw.
    """

    at_once = 16  # directions that ranks share out in one piece
    compile_s = 0.0  # seconds that this engine has spent compiling

    def __init__(self, model: Callable, loss: str | Callable, parameters: Mapping[str, Tensor] | None = None):
        if isinstance(loss, str) and loss not in LOSSES:
            raise InputError(f'loss = "{loss}": expected "cross_entropy", "mse" or a callable (outputs, targets) -> scalar')
        if parameters is None and not isinstance(model, torch.nn.Module):
            raise InputError("a callable that is not a torch.nn.Module needs parameters = {name: tensor}")
        self.model = model
        self.loss = LOSSES[loss] if isinstance(loss, str) else loss
        self.index = ParameterIndex(parameters) if parameters is not None else ParameterIndex.of(model)
        self.queries = 0
        self.peak_bytes = 0  # what the engine holds besides the model
        self._buffers = list(model.buffers()) if isinstance(model, torch.nn.Module) else []
        self._before: list[Tensor] = []
        self.unbind()

    @property
    def environment(self) -> dict[str, str]:
        """What its bits depend on beside the input and the processor: whether it compiles, and kernels of our own in use."""
        return {"compiled": "False", "kernels": "none"}

    @torch.no_grad()
    def bind(self, inputs: Tensor, targets: Tensor) -> float:
        """The batch loss at theta. Later differences are on this batch. The only pass that moves buffers."""
        self.unbind()
        self._inputs, self._targets = inputs, targets
        version = inputs._version
        self._before = [b.clone() for b in self._buffers]
        self._rng = self._rng_states()
        base = self.loss(self._run_base(), targets)
        self.queries += 1
        if inputs._version != version:
            raise InputError(f"{type(self.model).__name__} overwrites its input, so no second pass would see the same batch")
        self._base = base
        return float(base)

    def unbind(self) -> None:
        """Forget the batch: differences need a new :meth:`bind` first, as they do after theta has moved."""
        self._base: Tensor | None = None

    def cut(self, coords: np.ndarray) -> list[range]:
        """Chunks of a coordinate list [n], as ranges of positions."""
        return cut(self.index.owner(coords), CHUNK)

    @torch.no_grad()
    def differences(self, coords, mu: float) -> Tensor:
        """l(theta + mu e_j) - l(theta) for each j in ``coords`` (int64 [n], any order) -> [n] in the parameters' dtype.

        Raises InputError for a coordinate outside 0 <= j < d.
        """
        self._need_base()
        elements = [self.index.element(j) for j in checked(coords)]
        values = []
        with self._unchanged():
            for owner, element in elements:
                saved = element.clone()
                try:
                    element.add_(mu)
                    values.append(self._evaluate(owner) - self._base)
                finally:
                    element.copy_(saved)  # the saved value: adding and subtracting mu would not give the same bits
        return self._stack(values)

    @torch.no_grad()
    def directional(self, directions, mu: float) -> Tensor:
        """l(theta + mu u_i) - l(theta) for each direction u_i [d] of ``directions`` ([q, d] or any iterable) -> [q]."""
        self._need_base()
        values = []
        with self._unchanged():
            saved = [p.detach().clone() for p in self.index.parameters]
            for u in directions:
                try:
                    for p, piece in zip(self.index.parameters, self.index.split(u).values(), strict=True):
                        p.add_(piece.to(p), alpha=mu)
                    values.append(self._evaluate(None) - self._base)
                finally:
                    for p, value in zip(self.index.parameters, saved, strict=True):
                        p.copy_(value)
        return self._stack(values)

    def _by_chunks(self, coords, evaluate: Callable[[np.ndarray], Tensor]) -> Tensor:
        """``evaluate(chunk)`` [len(chunk)] for all chunks of the sorted coordinates -> [n], in the order of ``coords``."""
        self._need_base()
        coords = np.array(checked(coords), np.int64)
        order = np.argsort(coords, kind="stable")
        out = torch.zeros(len(coords), dtype=self.index.dtype, device=self.index.device)
        with self._unchanged():  # an operation without a rule runs as it is, its bookkeeping included
            for chunk in self.cut(coords[order]):
                where = order[chunk.start : chunk.stop]
                out[torch.from_numpy(where).to(out.device)] = evaluate(coords[where]).to(out.dtype)
        return out

    def gradient(self) -> list[Tensor]:
        """Autograd's gradient g of the bound loss, one tensor per parameter: the first-order baseline, no query."""
        with self._unchanged(), torch.enable_grad():
            return self._grad(self._rewound_loss())

    def hessian_gradient(self) -> list[Tensor]:
        """H g by autograd, H the Hessian of the bound loss, one tensor per parameter (needs a twice differentiable white box)."""
        with self._unchanged(), torch.enable_grad():  # buffers may be put back only after the second pass has read them
            gradient = self._grad(self._rewound_loss(), create_graph=True)
            return self._grad(sum((g * g.detach()).sum() for g in gradient))

    def _rewound_loss(self) -> Tensor:
        self._need_base()
        self._rewind()
        return self.loss(self.model(self._inputs), self._targets)

    def _grad(self, value: Tensor, create_graph: bool = False) -> list[Tensor]:
        grads = torch.autograd.grad(value, self.index.parameters, create_graph=create_graph, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, self.index.parameters, strict=True)]

    def _run_base(self) -> Tensor:
        return self.model(self._inputs)

    def _evaluate(self, owner: int | None) -> Tensor:
        """The loss at the perturbed parameters; ``owner`` is the one parameter that differs from the base, if one."""
        self.queries += 1
        self._rewind()
        return self.loss(self._run_perturbed(owner), self._targets)

    def _run_perturbed(self, owner: int | None) -> Tensor:
        return self.model(self._inputs)

    def _need_base(self) -> None:
        if self._base is None:
            raise InputError("no batch is bound: call engine.bind(inputs, targets) first")

    def _rewind(self) -> None:
        """Buffers and random numbers as the base pass found them."""
        with torch.no_grad():
            for buffer, value in zip(self._buffers, self._before, strict=True):
                buffer.copy_(value)
        self._set_rng_states(self._rng)

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        buffers, rng = [b.clone() for b in self._buffers], self._rng_states()
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(self._buffers, buffers, strict=True):
                    buffer.copy_(value)
            self._set_rng_states(rng)

    def _rng_states(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self.index.device)] if self.index.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    def _set_rng_states(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self.index.device)

    def _stack(self, values: list[Tensor]) -> Tensor:
        if not values:
            return torch.zeros(0, dtype=self.index.dtype, device=self.index.device)
        return torch.stack(values).reshape(len(values)).to(self.index.dtype)
