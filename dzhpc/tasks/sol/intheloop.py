"""What the engines of a solver in the loop share: windows that are bound, and queries that diverge."""

import logging
from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from dzhpc.engines.curvature import Curvature, Squares
from dzhpc.engines.network import NetworkEngine, checked
from dzhpc.engines.protocol import AT_ONCE, PLAIN
from dzhpc.method.coordinates import ParameterIndex
from dzhpc.tasks.sol.correction import Correction
from dzhpc.tasks.sol.loss import UnrolledLoss, Windows
from dzhpc.tasks.sol.simulators import Simulator

log = logging.getLogger("dzhpc")


class InTheLoop(NetworkEngine):
    """What both engines share: windows are bound; whatever moves several parameters runs all steps but the solver's first one."""

    at_once, compile_s, environment = AT_ONCE, 0.0, PLAIN

    def __init__(self, correction: Correction, simulator: Simulator, unroll: int):
        super().__init__(ParameterIndex.of(correction.model), correction.model)
        self.loss = UnrolledLoss(correction, simulator, unroll)
        self.diverged = 0  # queries, in all
        self._diverged_before = 0
        self._asked: list[int] = []  # coordinates of the last call; none if it was one of directions
        self._coordinate = 0  # that is moved at present; of a direction the number of its query
        self._gone: set[int] = set()  # those that have diverged
        self._windows: Windows | None = None
        self._first: Tensor | None = None  # S(s_0)
        self._advanced: tuple[Tensor, ...] = ()  # S(s_{i-1}), n of [B, ...]
        self._path: tuple[Tensor, ...] = ()  # s_i

    @property
    def curvature(self) -> Curvature:
        """See :class:`dzhpc.engines.protocol.Responding`; z: the states [n, B, ...] of all unrolled steps."""
        self._need_base()
        return Squares(torch.stack(self._path) - self._windows.states[:, 1:].movedim(1, 0), self.loss.weight)

    @torch.no_grad()
    def bind(self, windows: Windows) -> float:
        """The loss at theta. Later differences are on these windows. Raises NumericalError where theta itself diverges."""
        self._begin()
        self._say_how_many()
        self._windows, self._first = windows, self.loss.first(windows)
        return self._bound(self._base_losses().sum())

    @property
    def lost(self) -> int:
        """Queries that have diverged since the last bind."""
        return self.diverged - self._diverged_before

    def lost_queries(self, before: int) -> list[int]:
        """Which queries of the last call, before which there were so many, have diverged."""
        if self._asked:
            return [k for k, j in enumerate(self._asked) if j in self._gone]
        return sorted(number - before - 1 for number in self._gone if number > before)

    def _called(self, coords: Iterable[int]) -> list[int]:
        """The coordinates of a call that begins."""
        self._asked, self._gone = checked(coords), set()
        return self._asked

    @abstractmethod
    def responses(self, coords: Iterable[int], mu: float) -> Tensor:
        """s_i(theta + mu e_j) - s_i(theta), i = 1 .. n, for each j in ``coords`` -> [n_coords, n, B, ...]."""

    @abstractmethod
    def _base_losses(self) -> Tensor:
        """What each step and window adds to the loss at theta [n, B] float64."""

    def _follow(self) -> Tensor:
        """The same, and the states on the way are kept."""
        path: list[tuple[Tensor, Tensor]] = []
        terms = self.loss(self._windows, self._first, path)
        self._advanced, self._path = zip(*path, strict=True)
        return terms

    def _z_shape(self) -> tuple[int, ...]:
        self._need_base()
        return len(self._path), *self._path[0].shape

    def _loss(self, owner: int | None) -> Tensor:
        if owner is None:
            self._gone = self._gone if not self._asked else set()
            self._asked, self._coordinate = [], self.queries
        total = torch.zeros_like(self._base)
        for step, (*_, terms) in enumerate(self.loss.steps(self._windows, self._first)):
            if (bad := ~(terms <= self.loss.most)).any():
                query = "a random direction" if owner is None else self.index.describe(self._coordinate)
                self._lose(query, step, int(bad.nonzero()[0]))
                return self._base
            total += terms.sum()
        return total

    def _loss_with_graph(self) -> Tensor:
        return self.loss(self._windows, self._first).sum()

    def _lose(self, query: str, step: int, window: int) -> None:
        if self.diverged == self._diverged_before:
            name = self._windows.names[window]
            log.warning("%s diverges when perturbed (%s, unrolled step %d): it stays out of this step", query, name, step + 1)
        self.diverged += 1
        self._gone.add(self._coordinate)

    def _say_how_many(self) -> None:
        count, self._diverged_before = self.lost, self.diverged
        if count > 1:
            log.warning("%d perturbed queries in all diverged in the step before", count)
