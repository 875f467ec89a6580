"""The wake behind a rod: the experiment's constants, the layout of staggered states, down-sampling. NumPy and torch only.

Domain 100 x 200 (x across, y along the flow), U = 1, dt = 1; velocity open (zero gradient), pressure 0 outside. The parameter of
a simulation is "re", the viscosity is nu = 1e4 / re at every resolution (the paper's Reynolds numbers are 10 re / 128^2).
Source: the public code of Um et al. 2020, whose rod has radius 10, not the 5 of the paper's text.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

LENGTH = 100.0  # of the domain's short side
SPEED = 1.0
DT = 1.0


def pack(u: Tensor, v: Tensor) -> Tensor:
    """Face values u [N, nx + 1, ny], v [N, nx, ny + 1] -> a state [N, 2, nx + 1, ny + 1], zero where a component has no face."""
    n, nx, ny = len(u), v.shape[1], u.shape[2]
    states = u.new_zeros(n, 2, nx + 1, ny + 1)
    states[:, 0, :, :-1], states[:, 1, :-1] = u, v
    return states


def unpack(states: Tensor) -> tuple[Tensor, Tensor]:
    """The views u [..., nx + 1, ny], v [..., nx, ny + 1] of states [..., 2, nx + 1, ny + 1]."""
    return states[..., 0, :, :-1], states[..., 1, :-1, :]


@dataclasses.dataclass(frozen=True)
class Wake:
    """A grid of ``resolution`` x 2 ``resolution`` cells around a rod of ``radius`` at (50, 50)."""

    resolution: int = 32
    radius: float = 10.0

    @property
    def cells(self) -> tuple[int, int]:
        """(nx, ny)."""
        return self.resolution, 2 * self.resolution

    @property
    def dx(self) -> float:
        """The side of a cell."""
        return LENGTH / self.resolution

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a state: (2, nx + 1, ny + 1)."""
        nx, ny = self.cells
        return 2, nx + 1, ny + 1

    def boundary(self) -> np.ndarray:
        """Where v is held at U [nx, ny + 1], 1 or 0: the first two rows (but the last column), the left and right columns."""
        nx, ny = self.cells
        mask = np.zeros((nx, ny + 1))
        mask[: nx - 1, :2] = 1
        mask[0], mask[-1] = 1, 1
        return mask

    def initial(self) -> Tensor:
        """The state at rest [2, nx + 1, ny + 1] float32: v = U, and u = U in a patch that breaks the symmetry.

        The patch, 48 < x < 51.2 and 107.8 < y < 115.6, is that of the public code at 128 x 256 cells.
        """
        nx, ny = self.cells
        u, v = np.zeros((nx + 1, ny), np.float32), np.full((nx, ny + 1), SPEED, np.float32)
        x, y = np.arange(nx + 1) * self.dx, (np.arange(ny) + 0.5) * self.dx
        across, along = (x > 48) & (x < 51.2), (y > 107.8) & (y < 115.6)
        u[np.ix_(across, along)] = SPEED
        return pack(torch.from_numpy(u)[None], torch.from_numpy(v)[None])[0]

    def down(self, states: Tensor, factor: int) -> Tensor:
        """States of this grid [N, ...] on one ``factor`` times coarser: every factor-th face, the box mean across."""
        u, v = unpack(states)
        n, (nx, ny) = len(states), self.cells
        return pack(
            u[:, ::factor].reshape(n, nx // factor + 1, ny // factor, factor).mean(3),
            v[:, :, ::factor].reshape(n, nx // factor, factor, ny // factor + 1).mean(2),
        )


def viscosity(parameters: Tensor) -> Tensor:
    """nu = 1e4 / re."""
    return 1e4 / parameters
