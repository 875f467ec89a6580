"""Columns of the Jacobian over ranks: each stays where it was evaluated, and is sent only where it is asked for."""

import numpy as np
import torch
from torch import Tensor

from dzhpc.job.world import World
from dzhpc.method.estimators import Partial


class Columns:
    """The columns of the coordinates of S that this rank has: (positions [k], their slope, H_jj and column [k, 2 + M]), ...

    joined [n, 2]: slopes and diag H of all coordinates, on all ranks.
    """

    def __init__(self, found: list[tuple[np.ndarray, np.ndarray]], joined: np.ndarray):
        self._found, self.joined = found, joined

    def part(self, world: World, pieces: list[slice]) -> Tensor | None:
        """Of the ``pieces`` of the rows, one a rank, this rank's for all coordinates [n, ...]. Collective."""
        sent = [[(places, values[:, 2:][:, piece]) for places, values in self._found] for piece in pieces]
        received = world.alltoall(sent + [None] * (world.size - len(pieces)))
        return self._put(received) if world.rank < len(pieces) else None

    def whole(self, world: World) -> Tensor | None:
        """All columns [n, M], on the root; M = 0 where nothing is known. Collective."""
        received = world.gather([(places, values[:, 2:]) for places, values in self._found])
        return self._put(received) if received is not None else None

    def partial(self, world: World, done: np.ndarray) -> Partial:
        """What is known of a step, where ``done`` [n]: whole on the root, others have the first two numbers. Collective."""
        whole = self.whole(world)
        return Partial(self.joined if whole is None else np.concatenate([self.joined, whole.numpy()], 1), done)

    def _put(self, received: list) -> Tensor:
        pieces = [piece for some in received for piece in some]
        width = pieces[0][1].shape[1] if pieces else 0
        out = torch.zeros(len(self.joined), width, dtype=torch.from_numpy(self.joined).dtype)
        for places, values in pieces:
            out[torch.from_numpy(places)] = torch.from_numpy(np.ascontiguousarray(values))
        return out
