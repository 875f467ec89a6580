"""What the engines over a network share: theta is moved in place, one query at a time, and put back; gradients are autograd's."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.autograd.forward_ad as forward
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dzhpc.engines.pinned import Moment, Pinned, kept
from dzhpc.errors import InputError
from dzhpc.job import device as devices
from dzhpc.method.arrays import on_device
from dzhpc.method.coordinates import ParameterIndex
from dzhpc.method.first_order import differentiating


class NetworkEngine(ABC):
    """See :class:`dzhpc.engines.protocol.WhiteBox`. Subclasses are abstract or final; these bind, cut, evaluate differences.

    Wherever a loss is evaluated, buffers and random numbers are those that the base pass found. ``owner``: the number of the one
    parameter that differs from the base, None where several may.
    """

    def __init__(self, index: ParameterIndex, model: object):
        if index.device.type == "cpu":
            devices.keep_memory()
        self.index = index
        self.queries = 0
        self._pinned = Pinned(model, index.device)
        self._start: Moment | None = None  # as the base pass found buffers and random numbers
        self._base: Tensor | None = None  # the loss at theta, a scalar; None where no batch is bound

    @property
    def base(self) -> float:
        """The loss at theta that was bound last."""
        self._need_base()
        return float(self._base)

    def unbind(self) -> None:
        """See :class:`dzhpc.engines.protocol.Engine`."""
        self._base = None

    def rewind(self) -> None:
        """Buffers and random numbers become what the base pass found."""
        self._need_base()
        self._pinned.rewind(self._start)

    @torch.no_grad()
    def directional(self, directions: Iterable[Tensor], mu: float) -> Tensor:
        """l(theta + mu u_i) - l(theta) for each direction u_i [d] of ``directions`` ([q, d] or any iterable) -> [q]."""
        self._need_base()
        values = []
        with self._pinned.unchanged():
            for u in directions:
                with kept(self.index.parameters):
                    for p, piece in zip(self.index.parameters, self.index.split(u).values(), strict=True):
                        p.add_(piece.to(p), alpha=mu)
                    values.append(self._query(None) - self._base)
        return stacked(values, self.index)

    def gradient(self, through: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """Autograd's gradient g of the bound loss, one tensor per parameter: the first-order baseline, no query.

        through: inputs -> outputs in the model's place, with the same values and another way back.
        """
        self._need_base()
        with self._pinned.unchanged(), differentiating(getattr(self, "model", self)), torch.enable_grad():
            return self._grad(self._rewound_loss(through))

    @torch.no_grad()
    def slopes(self, directions: Iterable[Tensor]) -> Tensor:
        """<g, u_i>, exactly, for each direction u_i [d] -> [q]: one forward-mode pass each, which counts as a query.

        Raises InputError for what is no torch.nn.Module, RuntimeError (torch's) where an operation has no such derivative.
        """
        self._need_base()
        if not isinstance(self.model, torch.nn.Module):
            raise InputError("forward-mode derivatives need a torch.nn.Module")
        values, (inputs, targets) = [], self.batch
        with self._pinned.unchanged(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():  # others have no forward mode
            warnings.simplefilter("ignore", FutureWarning)  # torch's, of its own formulas
            for u in directions:
                self.queries += 1
                self._pinned.rewind(self._start)
                with forward.dual_level():
                    pieces = self.index.split(u)
                    along = {n: forward.make_dual(p, pieces[n]) for n, p in zip(pieces, self.index.parameters, strict=True)}
                    value = self.loss(torch.func.functional_call(self.model, along, (inputs,)), targets)
                    slope = forward.unpack_dual(value).tangent
                if slope is None:  # something on the way has dropped it
                    raise RuntimeError("no derivative reaches the loss")
                values.append(slope.clone())
        return stacked(values, self.index)

    def hessian_gradient(self, through: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """H g by autograd, H the Hessian of the bound loss, one tensor per parameter (needs a twice differentiable white box).

        through: inputs -> outputs in the model's place.
        Raises InputError where an operation has no second derivative.
        """
        self._need_base()
        # buffers may be put back only after the second pass has read them; fused attention has no second derivative
        with (
            self._pinned.unchanged(),
            differentiating(getattr(self, "model", self)),
            sdpa_kernel(SDPBackend.MATH),
            torch.enable_grad(),
        ):
            gradient = self._grad(self._rewound_loss(through), create_graph=True)
            return self._grad(sum((g * g.detach()).sum() for g in gradient))

    @abstractmethod
    def _loss(self, owner: int | None) -> Tensor:
        """The loss at the parameters as they are now, a scalar."""

    @abstractmethod
    def _loss_with_graph(self) -> Tensor:
        """The loss at theta, a scalar, for autograd."""

    def _begin(self) -> None:
        """A base pass begins."""
        self.unbind()
        self._start = self._pinned.begin()

    def _bound(self, base: Tensor) -> float:
        """The base pass is over."""
        self._pinned.settle(self._start)
        self.queries += 1
        self._base = base
        return float(base)

    def _need_base(self) -> None:
        if self._base is None:
            raise InputError("no batch is bound: call engine.bind(inputs, targets) first")

    def _one_by_one(self, coords: Iterable[int], mu: float) -> Tensor:
        """l(theta + mu e_j) - l(theta), each coordinate really moved -> [n]."""
        return stacked(self._moving_each(coords, mu, lambda owner: self._query(owner) - self._base), self.index)

    def _moving_each(self, coords: Iterable[int], mu: float, ask: Callable[[int], Tensor]) -> list[Tensor]:
        """``ask(owner)`` for each coordinate, moved by mu meanwhile."""
        self._need_base()
        elements = [self.index.element(j) for j in checked(coords)]
        values = []
        with self._pinned.unchanged():
            for owner, element in elements:
                with kept([element]):
                    element.add_(mu)
                    values.append(ask(owner))
        return values

    def _by_chunks(self, coords: Iterable[int], evaluate: Callable[[np.ndarray], Tensor], shape: tuple[int, ...] = ()) -> Tensor:
        """``evaluate(chunk)`` [len(chunk), *shape] for all chunks of the sorted coordinates -> [n, *shape], as in ``coords``."""
        self._need_base()
        coords = integers(coords).astype(np.int64)
        order = np.argsort(coords, kind="stable")
        found = torch.zeros(len(coords), *shape, dtype=self.index.dtype, device=self.index.device)
        with self._pinned.unchanged():  # an operation without a rule runs as it is, its bookkeeping included
            for chunk in self.cut(coords[order]):
                found[chunk.start : chunk.stop] = evaluate(coords[order[chunk.start : chunk.stop]])
        return found if (order[1:] > order[:-1]).all() else found[on_device(np.argsort(order), found.device)]

    def _query(self, owner: int | None) -> Tensor:
        self.queries += 1
        self._pinned.rewind(self._start)
        return self._loss(owner)

    def _rewound_loss(self, through: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        self._pinned.rewind(self._start)
        if through is None:
            return self._loss_with_graph()
        inputs, targets = self.batch
        return self.loss(through(inputs), targets)

    def _grad(self, value: Tensor, create_graph: bool = False) -> list[Tensor]:
        grads = torch.autograd.grad(value, self.index.parameters, create_graph=create_graph, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, self.index.parameters, strict=True)]


def integers(coords: Iterable[int]) -> np.ndarray:
    """Coordinates as an array. Raises InputError for anything but integers: a mask of booleans is not a list of indices."""
    array = np.asarray(coords)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"coordinates must be integers [n], found {array.dtype} {list(array.shape)}")
    return array


def checked(coords: Iterable[int]) -> list[int]:
    """As :func:`integers`, as a list."""
    return [int(j) for j in integers(coords)]


def stacked(values: list[Tensor], index: ParameterIndex) -> Tensor:
    """Scalars as one vector [n] in the parameters' dtype."""
    if not values:
        return torch.zeros(0, dtype=index.dtype, device=index.device)
    return torch.stack(values).reshape(len(values)).to(index.dtype)


@contextmanager
def untouched(inputs: Tensor, model: object) -> Iterator[None]:
    """Raises InputError where the model overwrites its batch or a parameter within."""
    parameters = dict(model.named_parameters()) if isinstance(model, torch.nn.Module) else {}
    version, versions = inputs._version, {name: p._version for name, p in parameters.items()}
    yield
    if inputs._version != version:
        raise InputError(f"{type(model).__name__} overwrites its input, so no second pass would see the same batch")
    for name, p in parameters.items():
        if p._version != versions[name]:
            raise InputError(f"{type(model).__name__} overwrites its parameter {name} in forward, so no query would be at theta")
