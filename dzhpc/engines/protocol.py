"""What every engine offers to estimators and trainer, and in which order it is asked.

1. ``bind(...)`` runs the base pass at theta on one batch. What it takes is the affair of the engine and of the task that owns it:
   ``bind(inputs, targets)`` for a network, ``bind(step)`` for a user's own loss, ``bind(windows)`` for a solver in the loop. It
   returns the base loss as a float, and counts as one query.
2. ``differences``, ``directional``, and a white box's ``gradient`` and ``hessian_gradient``, any number of times in any order:
   all are about the batch that was bound last, at the theta at which it was bound.
3. After theta has moved, or for another batch, a new ``bind``. Nobody checks that theta has stayed; ``unbind`` says that it has
   not, or that the batch is done with: until the next ``bind`` whatever needs a base pass raises InputError.

``cut`` depends on the shape of the batch bound last, not on its values: it may be asked before a step's ``bind`` and after
``unbind``, since a trainer deals out coordinates first. It raises InputError where sizes depend on a shape and none was bound.
A chunk is what is worth computing at once; ``differences`` gives the same numbers for any list of coordinates.

Between two calls parameters, buffers and random number generators are bit for bit what they were before, also where a call has
raised; only ``bind`` moves buffers (running statistics), once. Equal calls give equal bits.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from torch import Tensor

from dzhpc.engines.curvature import Curvature
from dzhpc.method.coordinates import ParameterIndex

PLAIN = {"compiled": "False", "kernels": "none"}  # the environment of an engine that leaves all to torch
AT_ONCE = 16  # directions in a piece, for an engine that takes them one by one: a look at the clock between two pieces


class Engine(Protocol):
    """Evaluates l(theta + mu e_j) - l(theta), and the same along directions, for the batch that is bound.

    d: trainable coordinates. Every number is in the parameters' dtype (``index.dtype``), on their device.
    """

    index: ParameterIndex  # the coordinates 0 .. d - 1, the parameters that they belong to

    @property
    def queries(self) -> int:
        """Evaluations of the loss so far: one a coordinate or direction, one a ``bind``."""

    @property
    def base_bytes(self) -> int:
        """Bytes of what the last ``bind`` keeps besides the model: the same on every rank, whatever is asked afterwards.

        It is the memory that a run's record shows, which depends neither on ranks nor on restarts.
        """

    @property
    def peak_bytes(self) -> int:
        """Bytes that the engine holds now besides the model: base values, the batch among them, and what was derived from them.

        It grows while a batch's differences are evaluated, so that its peak is after the last of them. What a call needs for
        itself, and lets go of when it returns, does not count.
        """

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling so far; 0 for an engine that compiles nothing."""

    @property
    def environment(self) -> dict[str, str]:
        """What bits depend on beside the input: equal on all ranks, or their replicas part.

        "compiled": "True" or "False". "kernels": our own kernels in use, such as "winograd fp32; direct fp32", or "none".
        """

    @property
    def at_once(self) -> int:
        """How many directions belong in one piece that is handed to ``directional``, at least 1."""

    def cut(self, coords: np.ndarray) -> list[range]:
        """Chunks of a coordinate list [n] int64 as ranges of positions: all of 0 .. n - 1 in order, each once; [] for n = 0.

        They follow from ``coords`` and the shape of the batch bound last, never from the rank count or from earlier calls.
        Raises InputError where no batch was ever bound and sizes depend on one, for a coordinate outside 0 <= j < d, and where
        the memory that is allowed has no room for one coordinate.
        """

    def differences(self, coords: Iterable[int], mu: float) -> Tensor:
        """l(theta + mu e_j) - l(theta) for each j of ``coords`` (integers [n], any order, repeated or not) -> [n].

        mu: the perturbation in the units of theta, of any sign. Exactly 0 where the output does not depend on a coordinate. A
        difference that is not finite is given back as such: who asks knows the coordinate and says so.
        Raises InputError without a bound batch, for what is not an integer, and for one outside 0 <= j < d, before any query;
        BlackBoxError or NumericalError where a black box in the loss fails, see :class:`dzhpc.engines.blackbox.BlackBox`.
        """

    def directional(self, directions: Iterable[Tensor], mu: float) -> Tensor:
        """l(theta + mu u_i) - l(theta) for each direction u_i [d] of ``directions`` ([q, d], or an iterable) -> [q].

        Raises as ``differences`` does.
        """

    def unbind(self) -> None:
        """Forget the base loss: differences need a new ``bind`` first. ``cut`` goes on with the shape bound last."""

    def explain(self) -> str:
        """How the engine evaluates, a line a parameter where parameters differ: operations, why refused, chunk size, programs.

        Raises InputError where that depends on a batch and none was ever bound.
        """


class Responding(Engine, Protocol):
    """An engine that gives whole outputs z: a network's, a black box's answers, the states of a solver, residuals.

    The differences of ``differences`` are a reduction of the same numbers; a query is counted once whichever is asked for.
    """

    @property
    def curvature(self) -> "Curvature":
        """The loss as a function of z, around z(theta). Raises InputError without a bound batch, or where it is not known."""

    def responses(self, coords: Iterable[int], mu: float) -> Tensor:
        """z(theta + mu e_j) - z(theta) for each j of ``coords`` -> [n, *z.shape]: mu times the columns of dz/dtheta, to O(mu).

        Exactly 0 where z does not depend on a coordinate, and for a query that is lost (diverged, infeasible). Raises as
        ``differences`` does.
        """


class WhiteBox(Engine, Protocol):
    """An engine that sees into its network, so that autograd serves as a first-order baseline. Only ``slopes`` asks."""

    def gradient(self, through: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """g, the exact gradient of the bound loss: a tensor for each parameter; 0 where the loss does not depend on it.

        through: inputs -> outputs in the network's place, with the same values and another way back.
        Raises InputError without a bound batch.
        """

    def slopes(self, directions: Iterable[Tensor]) -> Tensor:
        """<g, u_i> for each direction u_i [d] -> [q], exactly, by forward-mode differentiation; each counts as a query.

        Raises InputError without a bound batch, RuntimeError (torch's) where some operation has no forward-mode derivative.
        """

    def hessian_gradient(self, through: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """H g, H the Hessian of the bound loss, shaped as :meth:`gradient`. For a loss that is differentiable twice.

        through: inputs -> outputs in the network's place.
        Raises InputError without a bound batch, RuntimeError (torch's) where some operation has no second derivative.
        """
