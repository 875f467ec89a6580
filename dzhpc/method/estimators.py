"""Gradient estimators: pure functions over an engine with a bound batch, and classes by which the training loop knows them.

CGE: g_j = [l(theta + mu e_j) - l(theta)] / mu for each coordinate j                                (eq. 1)
RGE: g = 1/q sum_i [l(theta + mu u_i) - l(theta)] / mu * u_i,  u_i ~ N(0, I), a function of (seed, i)  (eq. 1)

Chen et al., DeepZero, ICLR 2024 (arXiv 2310.02025). No MPI here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dzhpc.config import import_object
from dzhpc.errors import InputError
from dzhpc.method.arrays import on_device
from dzhpc.method.coordinates import ParameterIndex
from dzhpc.method.seeds import derive, generator

BLOCK = 64  # directions summed in one matrix product; fixed, since it decides the order of the sum


@dataclass
class Partial:
    """An estimate left unfinished: ``values`` [n] hold where ``done`` [n] (bool); n coordinates of S, or q directions.

    Of an estimator with several numbers a unit, values are [n, numbers].
    """

    values: np.ndarray
    done: np.ndarray


def cge(engine, coords, mu: float, difference: str = "forward") -> Tensor:
    """Coordinate-wise estimate on ``coords`` (int64 [n]) -> [n] in the parameters' dtype.

    "forward" costs n queries and errs by mu/2 * H_jj; "central", [l(+mu) - l(-mu)] / 2 mu, costs 2n and errs by O(mu^2).
    """
    if difference == "central":
        return central(engine, lambda mu: engine.differences(coords, mu), mu)
    return engine.differences(coords, mu) / mu


def central(engine, ask: Callable[[float], Tensor], mu: float) -> Tensor:
    """[ask(mu) - ask(-mu)] / 2 mu [n, ...]; 0 for queries that are lost on either side: one half of a slope is none."""
    (up, lost), (down, others) = _asked(engine, ask, mu), _asked(engine, ask, -mu)
    slope = (up - down) / (2 * mu)
    for which in filter(None, (lost, others)):
        slope[which] = slope[which] * 0 + 0  # what is no number stays none
    return slope


def _asked(engine, ask: Callable[[float], Tensor], mu: float) -> tuple[Tensor, list[int]]:
    """``ask(mu)``, and which of its queries count as 0, the loss being lost there; only some engines lose any."""
    lost = getattr(engine, "lost_queries", None)
    before = engine.queries if lost else 0
    found = ask(mu)
    return found, lost(before) if lost else []


def rge(engine, q: int, mu: float, seed: int, difference: str = "forward") -> dict[str, Tensor]:
    """Estimate from q Gaussian directions over all coordinates: name -> tensor; q queries ("central": 2q)."""
    if q < 1:
        raise InputError(f"q = {q}: expected at least one direction")
    coords = np.arange(engine.index.size)
    slopes = rge_slopes(engine, range(q), mu, seed, coords, difference)
    flat = torch.zeros(engine.index.size, dtype=engine.index.dtype, device=engine.index.device)
    flat[on_device(coords, flat.device)] = rge_sum(slopes, seed, coords, engine.index)
    return engine.index.split(flat)


def rge_slopes(engine, indices, mu: float, seed: int, coords: np.ndarray, difference: str = "forward") -> Tensor:
    """[l(theta + mu u_i) - l(theta)] / mu for each direction index i -> [len(indices)]; u_i is zero outside ``coords``."""
    along = lambda mu: engine.directional(directions(engine.index, indices, seed, coords), mu)  # noqa: E731
    return central(engine, along, mu) if difference == "central" else along(mu) / mu


def directions(index: ParameterIndex, indices, seed: int, coords: np.ndarray) -> Iterator[Tensor]:
    """u_i [d] for each i of ``indices``, zero outside ``coords``."""
    where = on_device(coords, index.device)
    for i in indices:
        u = torch.zeros(index.size, dtype=index.dtype, device=index.device)
        u[where] = direction(seed, i, len(coords), index)
        yield u


def rge_sum(slopes: Tensor, seed: int, coords: np.ndarray, index: ParameterIndex) -> Tensor:
    """1/q sum_i slopes_i u_i on ``coords`` [n]: the directions are computed anew, so only q scalars need to travel."""
    total = torch.zeros(len(coords), dtype=index.dtype, device=index.device)
    for start in range(0, len(slopes), BLOCK):
        part = slopes[start : start + BLOCK]
        total += part @ torch.stack([direction(seed, start + k, len(coords), index) for k in range(len(part))])
    return total / len(slopes)


def direction(seed: int, i: int, n: int, index: ParameterIndex) -> Tensor:
    """The i-th Gaussian direction [n]: a function of (seed, i), whoever computes it."""
    return on_device(torch.randn(n, generator=generator(seed, "direction", i), dtype=index.dtype), index.device)


def autograd(engine) -> dict[str, Tensor]:
    """The exact gradient of the bound loss by back-propagation (needs a white box): name -> tensor."""
    return dict(zip(engine.index.names, engine.gradient(), strict=True))


class Estimator(ABC):
    """A gradient estimator as the training loop sees it. ``zo.estimator = "package.module:Class"`` names one of the user's own.

    A step's work is so many ``units``; ranks share them out in pieces. ``evaluate`` gives one number a unit, and ``combine``
    makes the estimate of all numbers, by the same arithmetic on every rank. Both are functions of (theta, batch, step) alone, so
    that bits depend on no rank; what a unit's number is must not depend on the piece that it comes in.

    zo: the section of the input (mu, q, difference, ...). seed: ``run.seed``.
    """

    numbers = 1  # of a unit
    by_coordinate = False  # whether units are the positions of S: the engine cuts them, and measured cost deals them out
    asks = True  # whether it asks for the loss at perturbed points at all, and expects some of them to differ
    step_length: float | None = None  # of a method that moves theta itself: ``combine`` gives the move, and there is no optimiser

    def __init__(self, zo, seed: int):
        self.zo, self.seed = zo, seed

    @abstractmethod
    def units(self, n: int) -> int:
        """What ranks share of a step on n coordinates; 0: nothing, ``combine`` does it all on every rank."""

    def perturbations(self, n: int) -> int:
        """Evaluations of the loss at perturbed points in a step on n coordinates."""
        return (2 if self.zo.difference == "central" else 1) * self.units(n)

    def evaluate(self, engine, coords: np.ndarray, step: int, piece: range) -> Tensor:
        """One number for each unit of ``piece``: [len(piece)] in the parameters' dtype. coords: S, sorted int64 [n]."""
        raise NotImplementedError(f"{type(self).__name__} says that it has units, but not how one is evaluated")

    @abstractmethod
    def combine(self, engine, coords: np.ndarray, step: int, values: Tensor) -> Tensor:
        """The estimate on S [n] from the numbers of all units [units(n)]."""

    def place(self, index: ParameterIndex, coords: np.ndarray, unit: int) -> str:
        """What an error calls the number of a unit."""
        return f"number {unit} of the estimate"

    def check(self, engine) -> None:  # noqa: B027
        """A batch is bound, and nothing was trained. Raises InputError for a network or a loss that it cannot take."""

    def begin(self, engine) -> None:  # noqa: B027
        """Before the first step, at the starting weights: what it has to remember of them. A restart calls ``restore`` then."""

    def coordinates(self) -> np.ndarray | None:
        """The sorted coordinates of the next step, where it chooses them itself; None: those of the sparsity pattern."""
        return None

    def advance(self, estimate: Tensor) -> None:  # noqa: B027
        """A step is done, of which ``combine`` gave ``estimate``."""

    def state(self) -> dict[str, Tensor]:
        """What it knows after a step that does not follow from theta and the step's number; a checkpoint keeps it."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Go on from what :meth:`state` gave."""


class CGE(Estimator):
    """Coordinate-wise: a unit is a position of S."""

    by_coordinate = True

    def units(self, n: int) -> int:
        return n

    def evaluate(self, engine, coords: np.ndarray, step: int, piece: range) -> Tensor:
        return cge(engine, coords[piece.start : piece.stop], self.zo.mu, self.zo.difference)

    def combine(self, engine, coords: np.ndarray, step: int, values: Tensor) -> Tensor:
        return values

    def place(self, index: ParameterIndex, coords: np.ndarray, unit: int) -> str:
        return f"the difference at {index.describe(int(coords[unit]))}"


class RGE(Estimator):
    """Random directions restricted to S: a unit is a direction, a function of (seed, step, its number)."""

    def units(self, n: int) -> int:
        return self.zo.q or n

    def evaluate(self, engine, coords: np.ndarray, step: int, piece: range) -> Tensor:
        return rge_slopes(engine, piece, self.zo.mu, self._seed(step), coords, self.zo.difference)

    def combine(self, engine, coords: np.ndarray, step: int, values: Tensor) -> Tensor:
        return rge_sum(values, self._seed(step), coords, engine.index)

    def place(self, index: ParameterIndex, coords: np.ndarray, unit: int) -> str:
        return f"the difference along direction {unit}"

    def _seed(self, step: int) -> int:
        return derive(self.seed, "rge", step)


class FZOO(RGE):
    """RGE divided by the standard deviation of its slopes, so that a step's length does not follow the scale of the loss.

    Source: FZOO (arXiv 2506.09034), which divides by that of the losses: this ``optim.lr`` is its rate / mu.
    """

    def units(self, n: int) -> int:
        return max(super().units(n), 2)

    def combine(self, engine, coords: np.ndarray, step: int, values: Tensor) -> Tensor:
        estimate, spread = super().combine(engine, coords, step, values), values.std()
        return estimate / spread if spread > 0 else estimate


class FirstOrder(Estimator):
    """Back-propagation, the baseline: no unit, no perturbation."""

    asks = False

    def units(self, n: int) -> int:
        return 0

    def combine(self, engine, coords: np.ndarray, step: int, values: Tensor) -> Tensor:
        flat = engine.index.flatten(autograd(engine).values())
        return flat[on_device(coords, flat.device)]


class Latent(FirstOrder):
    """CGE on an autoencoder's code, and the chain rule before it (ZO-AE-DS): its task makes the step, in parts that ranks share.

    The queries of the code are part of the task's cost of a base.
    """

    asks = True


ESTIMATORS = {  # the rivals lie in modules of their own, which know this one
    "cge": "dzhpc.method.estimators:CGE",
    "rge": "dzhpc.method.estimators:RGE",
    "fzoo": "dzhpc.method.estimators:FZOO",
    "autograd": "dzhpc.method.estimators:FirstOrder",
    "latent": "dzhpc.method.estimators:Latent",
    "pattern": "dzhpc.method.pattern_search:PatternSearch",
    "fg-w": "dzhpc.method.forward_gradient:ForwardGradient",
    "lg-fg-a": "dzhpc.method.forward_gradient:LocalForwardGradient",
    "fa": "dzhpc.method.feedback:FeedbackAlignment",
    "dfa": "dzhpc.method.feedback:DirectFeedbackAlignment",
    "align-ada": "dzhpc.method.feedback:AlignAda",
    "align-zero": "dzhpc.method.feedback:AlignZero",
}


def make_estimator(zo, seed: int) -> Estimator:
    """The estimator of ``zo.estimator``. Raises InputError for a name that is none."""
    kind = import_object(ESTIMATORS.get(zo.estimator, zo.estimator), "zo.estimator")
    if not (isinstance(kind, type) and issubclass(kind, Estimator)):
        raise InputError(f"zo.estimator = {zo.estimator}: expected a subclass of dzhpc.method.estimators.Estimator")
    return kind(zo, seed)
