"""Columns of the Jacobian over ranks: each stays where it was evaluated, and is sent only where it is asked for."""

import numpy as np
import torch
from torch import Tensor

from dzhpc.job.world import World
from dzhpc.method.estimators import Partial

AT_ONCE = 2**28  # bytes that the root is sent at once, of all ranks together: MPI counts to 2^31, and memory is short


class Columns:
    """The columns of the coordinates of S that this rank has: (positions [k], their slope, H_jj and column [k, 2 + M]), ...

    joined [n, 2]: slopes and diag H of all coordinates, on all ranks. owners [n]: the rank that has each, -1 where none does.
    """

    def __init__(self, found: list[tuple[np.ndarray, np.ndarray]], joined: np.ndarray, owners: np.ndarray):
        self._found, self.joined, self._owners = found, joined, owners
        places = np.concatenate([places for places, _ in found]) if found else np.zeros(0, np.int64)
        self._order = slice(None) if (np.diff(places) > 0).all() else np.argsort(places)

    def part(self, world: World, pieces: list[slice]) -> Tensor | None:
        """Of the ``pieces`` of the rows, one a rank, this rank's for all coordinates [n, ...]. Collective."""
        none = slice(0, 0)
        all_ranks = [*pieces, *[none] * (world.size - len(pieces))]
        width = all_ranks[world.rank].stop - all_ranks[world.rank].start
        received = world.exchange_numbers([self._rows(piece) for piece in all_ranks], self._counts(world) * width)
        return self._put(received, self._empty(width)) if world.rank < len(pieces) else None

    def whole(self, world: World) -> Tensor | None:
        """All columns [n, M], on the root; M = 0 where nothing is known. Collective."""
        width = world.maximum(max((values.shape[1] - 2 for _, values in self._found), default=0))
        out = self._empty(width) if world.is_root else None
        for piece in slices(width, len(self.joined) * self.joined.itemsize):
            received = world.gather_numbers(self._rows(piece), self._counts(world) * (piece.stop - piece.start))
            if received is not None:
                self._put(received, out[:, piece])
        return out

    def partial(self, world: World) -> Partial:
        """What is known of a step: whole on the root, others have the first two numbers. Collective."""
        whole = self.whole(world)
        values = self.joined if whole is None else np.concatenate([self.joined, whole.numpy()], 1)
        return Partial(values, self._owners >= 0)

    def _rows(self, piece: slice) -> np.ndarray:
        """A piece of the columns that this rank has [k, ...], in the order of S."""
        if not self._found:
            return self._empty(0).numpy()[:0]
        return np.concatenate([values[:, 2:][:, piece] for _, values in self._found])[self._order]

    def _counts(self, world: World) -> np.ndarray:
        """How many columns each rank has."""
        return np.bincount(self._owners[self._owners >= 0], minlength=world.size)

    def _empty(self, width: int) -> Tensor:
        return torch.zeros(len(self.joined), width, dtype=torch.from_numpy(self.joined).dtype)

    def _put(self, received: np.ndarray, out: Tensor) -> Tensor:
        """received: the ranks' rows, one rank after another."""
        places = np.argsort(self._owners, kind="stable")[np.count_nonzero(self._owners < 0) :]
        out[torch.from_numpy(places)] = torch.from_numpy(received.reshape(len(places), out.shape[1]))
        return out


def slices(count: int, itemsize: int) -> list[slice]:
    """0 .. count - 1, each of ``itemsize`` bytes, in pieces of AT_ONCE bytes or of one."""
    size = max(1, AT_ONCE // max(1, itemsize))
    return [slice(k, min(k + size, count)) for k in range(0, count, size)]
