"""The loss over unrolled steps, and how a perturbed network changes it: engines ``full`` and ``delta`` of a solver in the loop.

s_i = C(S(s_{i-1})), i = 1..n, S a step of the solver, C the correction; with r_i = s_i - reference, B windows,

    l(theta) = 1/n sum_i sum_B sum_entries (r_i / sigma)^2 / 2                                        (DeepZero, eq. A3)

A query *diverges* where a state is not finite, or its distance from the reference above DIVERGED sigma in the r.m.s. over its
entries. Its difference counts as 0, so the coordinate stays out of this step; that is counted, and named in a warning. Where
all of a chunk diverge, at least SEVERAL, their differences are NaN, which ends a run; a network that diverges unperturbed does.
"""

import logging
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dzhpc.engines.network import NetworkEngine, checked, stacked
from dzhpc.engines.protocol import AT_ONCE, PLAIN
from dzhpc.engines.rankone import repeated, try_out
from dzhpc.errors import InputError, NumericalError
from dzhpc.method.coordinates import ParameterIndex, cut
from dzhpc.tasks.sol.correction import Correction
from dzhpc.tasks.sol.simulators import Simulator

log = logging.getLogger("dzhpc")
DIVERGED = 30.0
SEVERAL = 8
STATES = {"cpu": 96, "cuda": 4096}  # of a chunk at most
BUDGET_MB = {"cpu": 32.0, "cuda": 8192.0}  # for their features: a core's cache, a GPU's fill; never a guess from the machine
COPIES = 3  # of a layer's largest features that are alive at once


class Diverged(NumericalError):
    """The corrected solver diverges at theta."""


@dataclass
class Windows:
    """Pieces of B reference trajectories: states [B, n + 1, ...], the first to start from; parameters [B]; what errors say."""

    states: Tensor
    parameters: Tensor
    names: list[str]

    def __getitem__(self, positions: slice) -> "Windows":
        return Windows(self.states[positions], self.parameters[positions], self.names[positions])


class UnrolledLoss:
    """(A3) of B windows, and when its steps diverge."""

    def __init__(self, correction: Correction, simulator: Simulator, unroll: int):
        self.correction, self.simulator, self.unroll = correction, simulator, unroll
        self.most = 0.5 / unroll * DIVERGED**2 * correction.entries  # that a step of a window adds if it has not diverged
        self._scale = 0.5 / unroll / correction.sigma.double().flatten() ** 2  # [C]

    @torch.no_grad()
    def first(self, windows: Windows) -> Tensor:
        """S(s_0) [B, ...], the same for all theta: the network comes after it."""
        return self.simulator(windows.states[:, 0], windows.parameters)

    def __call__(self, windows: Windows, first: Tensor | None = None, path: list | None = None) -> Tensor:
        """What each step and window adds to the loss [n, B] float64, with its graph.

        first: the solver's first step, where it is known. path: gets (S(s_{i-1}), s_i) for i = 1 .. n. Raises Diverged for a
        theta that diverges, NumericalError where the solver's first step, which knows no theta, is not finite.
        """
        losses = []
        for step, (advanced, states, terms) in enumerate(self.steps(windows, self.first(windows) if first is None else first)):
            if (bad := ~(terms <= self.most)).any():
                window = int(bad.nonzero()[0])
                name = windows.names[window]
                if step == 0 and not torch.isfinite(advanced[window]).all():
                    raise NumericalError(f"{name}: {self.simulator.name} makes what is not finite of this frame of the reference")
                raise Diverged(f"{name}, unrolled step {step + 1}: the corrected solver diverges, before any weight is perturbed")
            losses.append(terms)
            if path is not None:
                path.append((advanced, states))
        return torch.stack(losses)

    def steps(self, windows: Windows, advanced: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(S(s_{i-1}), s_i, what the step adds to the loss [B] float64) for i = 1 .. n, from S(s_0)."""
        for step in range(1, self.unroll + 1):
            states = self.correction(advanced, windows.parameters)
            yield advanced, states, self.weighed((states.double() - windows.states[:, step]).square())
            if step < self.unroll:
                advanced = self.simulator(states, windows.parameters)

    def weighed(self, squares: Tensor) -> Tensor:
        """Squares [..., *shape of a state] summed as (A3) does [...] float64; entries that a state has not are 0."""
        leading = squares.shape[: squares.ndim - len(self.correction.shape)]
        rows = squares.sum(-1).double().reshape(*leading, len(self._scale), -1)
        return (rows.sum(-1) * self._scale).sum(-1)


class InTheLoop(NetworkEngine):
    """What both engines share: windows are bound; whatever moves several parameters runs all steps but the solver's first one."""

    at_once, compile_s, environment = AT_ONCE, 0.0, PLAIN

    def __init__(self, correction: Correction, simulator: Simulator, unroll: int):
        super().__init__(ParameterIndex.of(correction.model), correction.model)
        self.loss = UnrolledLoss(correction, simulator, unroll)
        self.diverged = 0  # queries, in all
        self._diverged_before = 0
        self._coordinate: int | None = None  # that is moved at present; None: a random direction
        self._windows: Windows | None = None
        self._first: Tensor | None = None  # S(s_0)

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

    @abstractmethod
    def _base_losses(self) -> Tensor:
        """What each step and window adds to the loss at theta [n, B] float64."""

    def _loss(self, owner: int | None) -> Tensor:
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

    def _say_how_many(self) -> None:
        count, self._diverged_before = self.lost, self.diverged
        if count > 1:
            log.warning("%d perturbed queries in all diverged in the step before", count)


class Unrolled(InTheLoop):
    """Engine ``full``: all steps for each query, but for the solver's first one, which no perturbation reaches."""

    base_bytes = peak_bytes = 0

    def cut(self, coords: np.ndarray) -> list[range]:
        """Runs of one parameter."""
        return cut(self.index.owner(coords), SEVERAL)

    @torch.no_grad()
    def differences(self, coords, mu: float) -> Tensor:
        """l(theta + mu e_j) - l(theta) for each j in ``coords`` -> [n] in the parameters' dtype."""
        before, values = self.diverged, []
        for j in checked(coords):
            self._coordinate = j
            values.append(self._one_by_one([j], mu))
        values = torch.cat(values) if values else stacked([], self.index)
        return values.fill_(torch.nan) if self.diverged - before == len(values) >= SEVERAL else values

    def explain(self) -> str:
        """See :class:`dzhpc.engines.protocol.Engine`."""
        return f"engine full: {self.loss.unroll} corrected steps for every query, one coordinate at a time"

    def _base_losses(self) -> Tensor:
        return self.loss(self._windows, self._first)


class UnrolledDelta(InTheLoop):
    """Engine ``delta``: P perturbed networks advance P B states together (:mod:`dzhpc.engines.rankone`).

    No two losses are subtracted: with D = s_i(perturbed) - s_i the terms of (A3) change by D (2 r_i + D) / 2, so that fp32
    keeps its digits. batch: windows that will be bound, B. memory_mb: chunks are cut so that their features need no more (None:
    a fixed default for each device type).
    Raises InputError for a model that cannot run so, or a ``memory_mb`` too small for one coordinate.
    """

    def __init__(self, correction: Correction, simulator: Simulator, unroll: int, batch: int, memory_mb: float | None = None):
        super().__init__(correction, simulator, unroll)
        device, dtype = self.index.device, self.index.dtype
        states = torch.randn(2, *correction.shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        sample = correction.inputs(states * correction.sigma.mean(), states.new_ones(2))
        self._network, widest = try_out(correction.model, sample)
        self._bytes = COPIES * states.element_size() * max(widest, sample[0].numel())  # that a state needs
        self._size = self._fits(batch, memory_mb)
        self._terms: Tensor | None = None  # [n, B]
        self._advanced: tuple[Tensor, ...] = ()  # S(s_{i-1}), n of [B, ...]
        self._path: tuple[Tensor, ...] = ()  # s_i
        self._twice: list[Tensor] = []  # 2 r_i

    @property
    def base_bytes(self) -> int:
        """As ``peak_bytes``: it is known from the shapes."""
        return self.peak_bytes

    @property
    def peak_bytes(self) -> int:
        """Memory of the kept states, and of the features of a chunk; 0 before the first ``bind``."""
        kept = sum(t.numel() * t.element_size() for t in (*self._advanced, *self._path, *self._twice))
        return kept + self._size * len(self._windows.names) * self._bytes if self._path else 0

    def cut(self, coords: np.ndarray) -> list[range]:
        """Runs of one parameter, of one size that follows from the model and the batch."""
        return cut(self.index.owner(coords), self._size)

    @torch.no_grad()
    def differences(self, coords, mu: float) -> Tensor:
        """l(theta + mu e_j) - l(theta) for each j in ``coords`` -> [n] in the parameters' dtype."""
        return self._by_chunks(coords, lambda chunk: self._chunk(chunk, mu))

    def explain(self) -> str:
        """See :class:`dzhpc.engines.protocol.Engine`."""
        lines = [f"engine delta: {self.loss.unroll} corrected steps of {self._size} perturbed networks together"]
        for name, late in zip(self.index.names, self._network.part_late, strict=True):
            lines.append(f"{name}: the networks part in the {'perturbed layer' if late else 'input'} of the first step")
        return "\n".join(lines)

    def _base_losses(self) -> Tensor:
        path: list[tuple[Tensor, Tensor]] = []
        self._terms = self.loss(self._windows, self._first, path)
        self._advanced, self._path = zip(*path, strict=True)
        self._twice = [2 * (s - r) for s, r in zip(self._path, self._windows.states[:, 1:].unbind(1), strict=True)]
        return self._terms

    def _chunk(self, coords: np.ndarray, mu: float) -> Tensor:
        """Differences [P] of coordinates of one parameter."""
        owner, parameters, correction = int(self.index.owner(coords[:1])[0]), self._windows.parameters, self.loss.correction
        elements, p = coords - self.index.offsets[owner], len(coords)
        lost: dict[int, tuple[int, int]] = {}  # query -> where it diverged: step, window
        outputs = self._network.first(owner, elements, mu, correction.inputs(self._first, parameters))
        states = correction.add(repeated(self._first, p), outputs)
        parameters = parameters.repeat(p)
        total, same = self._compared(states, 0, lost)
        with self._network.perturbed(owner, elements, mu):
            for step in range(1, self.loss.unroll):
                advanced = self.loss.simulator(states, parameters)
                _replace(advanced, same, self._advanced[step])
                states = correction(advanced, parameters)
                change, same = self._compared(states, step, lost)
                total += change
        for query, where in lost.items():
            total[query] = torch.nan if len(lost) == p >= SEVERAL else 0
            self._lose(self.index.describe(int(coords[query])), *where)
        self.queries += p
        return total

    def _compared(self, states: Tensor, step: int, lost: dict[int, tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """(what the perturbations change in a step's terms [P] float64, which states [P, B] they have not changed).

        Queries that diverge enter ``lost``, and go on with the base's states: no NaN reaches a simulator.
        """
        parted = states.unflatten(0, (-1, len(self._windows.names)))
        change = parted - self._path[step]
        change = self.loss.weighed((change + self._twice[step]).mul_(change))
        if (bad := ~(self._terms[step] + change <= self.loss.most)).any():
            change = change.masked_fill(bad, 0)
            _replace(states, bad, self._path[step])
            for query, window in bad.nonzero().tolist():
                lost.setdefault(query, (step, window))
        if (same := change == 0).any():
            same &= (parted == self._path[step]).flatten(2).all(2)
        return change.sum(1), same

    def _fits(self, batch: int, memory_mb: float | None) -> int:
        """Coordinates in a chunk. Raises InputError where there is no room for one."""
        kind, each = self.index.device.type, batch * self._bytes
        budget = (memory_mb or BUDGET_MB[kind]) * 2**20
        if memory_mb and each > budget:
            raise InputError(
                f"zo.memory_mb = {memory_mb:g}: one coordinate needs {each / 2**20:.1f} MiB at this batch size; raise it or use "
                "a smaller data.batch_size"
            )
        return max(1, min(STATES[kind] // batch, int(budget // each)))


def _replace(states: Tensor, which: Tensor, base: Tensor) -> None:
    """Put base [B, ...] in place of those states [P B, ...] that ``which`` [P, B] says.

    The solver changes no state that a perturbation has not changed, but its last bits may depend on the size of the batch, and
    an optimiser like Adam makes a step of any gradient that is not quite zero.
    """
    if which.any():
        parted = states.unflatten(0, (-1, len(base)))
        parted[which] = base.expand_as(parted)[which]
