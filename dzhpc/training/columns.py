"""Columns of the Jacobian over ranks: each stays where it was evaluated, and is sent only where it is asked for."""

import numpy as np
import torch
from torch import Tensor

from dzhpc.job.world import World
from dzhpc.method.estimators import Partial

AT_ONCE = 2**28  # bytes that the root is sent at once, of all ranks together: MPI counts to 2^31, and memory is short


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
        if world.rank >= len(pieces):
            return None
        piece = pieces[world.rank]
        return self._put(received, self._empty(piece.stop - piece.start))

    def whole(self, world: World) -> Tensor | None:
        """All columns [n, M], on the root; M = 0 where nothing is known. Collective."""
        width = world.maximum(max((values.shape[1] - 2 for _, values in self._found), default=0))
        out = self._empty(width) if world.is_root else None
        for piece in slices(width, len(self.joined) * self.joined.itemsize):
            received = world.gather([(places, values[:, 2:][:, piece]) for places, values in self._found])
            if received is not None:
                self._put(received, out[:, piece])
        return out

    def partial(self, world: World, done: np.ndarray) -> Partial:
        """What is known of a step, where ``done`` [n]: whole on the root, others have the first two numbers. Collective."""
        whole = self.whole(world)
        return Partial(self.joined if whole is None else np.concatenate([self.joined, whole.numpy()], 1), done)

    def _empty(self, width: int) -> Tensor:
        return torch.zeros(len(self.joined), width, dtype=torch.from_numpy(self.joined).dtype)

    @staticmethod
    def _put(received: list, out: Tensor) -> Tensor:
        for places, values in (piece for some in received for piece in some):
            out[torch.from_numpy(places)] = torch.from_numpy(np.ascontiguousarray(values))
        return out


def slices(count: int, itemsize: int) -> list[slice]:
    """0 .. count - 1, each of ``itemsize`` bytes, in pieces of AT_ONCE bytes or of one."""
    size = max(1, AT_ONCE // max(1, itemsize))
    return [slice(k, min(k + size, count)) for k in range(0, count, size)]
