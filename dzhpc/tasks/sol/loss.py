"""The loss over unrolled steps of a solver in the loop.

s_i = C(S(s_{i-1})), i = 1..n, S a step of the solver, C the correction; with r_i = s_i - reference, B windows,

    l(theta) = 1/n sum_i sum_B sum_entries (r_i / sigma)^2 / 2                                        (DeepZero, eq. A3)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dzhpc.errors import NumericalError
from dzhpc.tasks.sol.correction import Correction
from dzhpc.tasks.sol.simulators import Simulator

DIVERGED = 30.0  # sigma in the r.m.s. over a state's entries: further from the reference a query diverges


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
        self.weight = (2 * self._scale).view(-1, *[1] * (len(correction.shape) - 1))  # of r^2 / 2, against a state

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
                    raise NumericalError(
                        f"{name}: {self.simulator.name} makes NaN or infinity of this frame of the reference; the network has no "
                        "part in that yet: call the solver with this state alone, or make a reference that fits it"
                    )
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
