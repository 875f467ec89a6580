"""Rollouts: the coarse solver, corrected or not, left to itself from a reference frame; its error at every step.

The error is mean |difference| over the entries that a state has (the wake's: all u and v faces), summed in float64.
A simulation has *diverged* once its error is not finite or above DIVERGED times the rms of its own reference: its state is then
at least twice as large as the reference, since mean |a - b| <= rms(a) + rms(b). Its errors are infinite from that step on.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dzhpc.tasks.sol.reference import Trajectories

DIVERGED = 3.0


@dataclass
class Rollout:
    """errors float64 [S, steps], of steps 1, 2, ...; bounds [S], above which a simulation has diverged; both on the CPU.

    kept: step -> states [S, ...] on the CPU; those of a diverged simulation are NaN.
    """

    errors: Tensor
    bounds: Tensor
    kept: dict[int, Tensor] = field(default_factory=dict)

    @property
    def diverged(self) -> Tensor:
        """The step at which each simulation diverged, int64 [S]; 0: it did not."""
        wrong = self.errors.isinf()
        return torch.where(wrong.any(1), wrong.int().argmax(1) + 1, 0)

    def mae(self, steps: int) -> Tensor:
        """The mean error over the first so many steps [S]; infinite for a simulation that diverged among them."""
        return self.errors[:, :steps].mean(1)

    def capped(self, steps: int) -> Tensor:
        """The same [S], a diverged step counted with the bound: finite, the larger the earlier it was. For choosing models."""
        return self.errors[:, :steps].minimum(self.bounds[:, None]).mean(1)


@torch.no_grad()
def rollout(
    simulator: Callable[[Tensor, Tensor], Tensor],
    correction: Callable[[Tensor, Tensor], Tensor] | None,
    trajectories: Trajectories,
    where: Tensor,
    steps: int,
    keep: Collection[int] = (),
) -> Rollout:
    """Start from frame 0 of each trajectory and go ``steps`` steps, at most F - 1; states after the steps ``keep`` are kept.

    where: which entries of a state count, bool [...]. All simulations are one batch; a diverged one starts anew, its numbers
    unused, so that the solver never sees what would hold up or spoil the others.
    """
    states, where = trajectories.states[:, 0], where.to(trajectories.states.device)
    bounds = DIVERGED * trajectories.states[:, :, where].double().square().mean((1, 2)).sqrt()
    lost, errors, kept = torch.zeros_like(bounds, dtype=torch.bool), [], {}
    if 0 in keep:
        kept[0] = states.cpu()
    for step in range(1, steps + 1):
        states = simulator(states, trajectories.parameters)
        if correction is not None:
            states = correction(states, trajectories.parameters)
        error = (states - trajectories.states[:, step])[:, where].double().abs().mean(1)
        lost |= ~(error <= bounds)  # NaN included
        errors.append(error.masked_fill(lost, torch.inf))
        mask = lost.view(-1, *[1] * where.ndim)
        if step in keep:
            kept[step] = states.masked_fill(mask, torch.nan).cpu()
        states = torch.where(mask, trajectories.states[:, 0], states)
    return Rollout(torch.stack(errors, 1).cpu(), bounds.cpu(), kept)
