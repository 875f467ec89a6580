"""How a perturbed network changes the loss over unrolled steps: engines ``full`` and ``delta`` of a solver in the loop.

A query *diverges* where a state is not finite, or its distance from the reference above DIVERGED sigma in the r.m.s. over its
entries. Its difference counts as 0, so the coordinate stays out of this step; that is counted, and named in a warning. Where
all of a chunk diverge, at least SEVERAL, their differences are NaN, which ends a run; a network that diverges unperturbed does.
"""

import logging

import numpy as np
import torch
from torch import Tensor

from dzhpc.engines.network import stacked
from dzhpc.engines.rankone import repeated, try_out
from dzhpc.errors import InputError
from dzhpc.method.coordinates import cut
from dzhpc.tasks.sol.correction import Correction
from dzhpc.tasks.sol.intheloop import InTheLoop
from dzhpc.tasks.sol.simulators import Simulator

log = logging.getLogger("dzhpc")
SEVERAL = 8
STATES = {"cpu": 96, "cuda": 4096}  # of a chunk at most
BUDGET_MB = {"cpu": 32.0, "cuda": 8192.0}  # for their features: a core's cache, a GPU's fill; never a guess from the machine
COPIES = 3  # of a layer's largest features that are alive at once


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
        for j in self._called(coords):
            self._coordinate = j
            values.append(self._one_by_one([j], mu))
        values = torch.cat(values) if values else stacked([], self.index)
        return values.fill_(torch.nan) if self.diverged - before == len(values) >= SEVERAL else values

    @torch.no_grad()
    def responses(self, coords, mu: float) -> Tensor:
        """See :class:`InTheLoop`."""
        before, values = self.diverged, []
        for j in self._called(coords):
            self._coordinate = j
            values += self._moving_each([j], mu, self._response)
        found = torch.stack(values) if values else self.index.parameters[0].new_zeros(0, *self._z_shape())
        return found.fill_(torch.nan) if self.diverged - before == len(values) >= SEVERAL else found

    def _base_losses(self) -> Tensor:
        return self._follow()

    def _response(self, owner: int) -> Tensor:
        self.queries += 1
        self._pinned.rewind(self._start)
        changes = []
        for step, (_, states, terms) in enumerate(self.loss.steps(self._windows, self._first)):
            if (bad := ~(terms <= self.loss.most)).any():
                self._lose(self.index.describe(self._coordinate), step, int(bad.nonzero()[0]))
                return torch.zeros(self._z_shape(), dtype=states.dtype, device=states.device)
            changes.append(states - self._path[step])
        return torch.stack(changes)

    def explain(self) -> str:
        """See :class:`dzhpc.engines.protocol.Engine`."""
        return f"engine full: {self.loss.unroll} corrected steps for every query, one coordinate at a time"


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
        return self._by_chunks(self._called(coords), lambda chunk: self._chunk(chunk, mu))

    @torch.no_grad()
    def responses(self, coords, mu: float) -> Tensor:
        """See :class:`InTheLoop`."""

        def evaluate(chunk: np.ndarray) -> Tensor:
            changes = self._path[0].new_empty(len(chunk), *self._z_shape())
            self._chunk(chunk, mu, changes)
            return changes

        return self._by_chunks(self._called(coords), evaluate, self._z_shape())

    def explain(self) -> str:
        """See :class:`dzhpc.engines.protocol.Engine`."""
        lines = [f"engine delta: {self.loss.unroll} corrected steps of {self._size} perturbed networks together"]
        for name, late in zip(self.index.names, self._network.part_late, strict=True):
            lines.append(f"{name}: the networks part in the {'perturbed layer' if late else 'input'} of the first step")
        return "\n".join(lines)

    def _base_losses(self) -> Tensor:
        self._terms = self._follow()
        self._twice = [2 * (s - r) for s, r in zip(self._path, self._windows.states[:, 1:].unbind(1), strict=True)]
        return self._terms

    def _chunk(self, coords: np.ndarray, mu: float, changes: Tensor | None = None) -> Tensor:
        """Differences [P] of coordinates of one parameter. changes [P, n, B, ...]: gets those of the states."""
        owner, parameters, correction = int(self.index.owner(coords[:1])[0]), self._windows.parameters, self.loss.correction
        elements, p = coords - self.index.offsets[owner], len(coords)
        lost: dict[int, tuple[int, int]] = {}  # query -> where it diverged: step, window
        outputs = self._network.first(owner, elements, mu, correction.inputs(self._first, parameters))
        states = correction.add(repeated(self._first, p), outputs)
        parameters = parameters.repeat(p)
        total, same = self._compared(states, 0, lost, changes)
        with self._network.perturbed(owner, elements, mu):
            for step in range(1, self.loss.unroll):
                advanced = self.loss.simulator(states, parameters)
                _replace(advanced, same, self._advanced[step])
                states = correction(advanced, parameters)
                change, same = self._compared(states, step, lost, changes)
                total += change
        for query, where in lost.items():
            total[query] = torch.nan if len(lost) == p >= SEVERAL else 0
            if changes is not None:
                changes[query] = total[query]
            self._coordinate = int(coords[query])
            self._lose(self.index.describe(self._coordinate), *where)
        self.queries += p
        return total

    def _compared(
        self, states: Tensor, step: int, lost: dict[int, tuple[int, int]], changes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(what the perturbations change in a step's terms [P] float64, which states [P, B] they have not changed).

        Queries that diverge enter ``lost``, and go on with the base's states: no NaN reaches a simulator.
        """
        parted = states.unflatten(0, (-1, len(self._windows.names)))
        change = parted - self._path[step]
        if changes is not None:
            changes[:, step] = change
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
