"""Pattern search (Chiang et al. 2023, after Hooke and Jeeves): moves of one coordinate by the radius r, to either side.

theta' = theta + r s e_j, (j, s) the move of the lowest loss of a block of moves, if that is below the loss at theta; else theta.
A poll is a pass over all 2d moves, shuffled; it ends, and another begins, with a move that is taken. Where all of a poll fail r
is halved. Losses are never subtracted: what is compared are the engine's differences.
"""

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dzhpc.method.coordinates import ParameterIndex
from dzhpc.method.estimators import Estimator
from dzhpc.method.seeds import generator

log = logging.getLogger("dzhpc")


class PatternSearch(Estimator):
    """A step is a block of a poll: ``zo.q`` moves, both signs of q/2 coordinates (None: of all). ``zo.mu`` is the first radius.

    The order of a poll is a function of (seed, its number); of equal losses the first in the sorted block counts, up before down;
    a NaN is above all. radius, poll, block: of the next step.
    """

    by_coordinate, asks, numbers = True, False, 2

    def __init__(self, zo, seed: int):
        super().__init__(zo, seed)
        self.radius, self.poll, self.block = zo.mu, 0, 0
        self._d = 0

    @property
    def step_length(self) -> float:
        return self.radius

    def units(self, n: int) -> int:
        return n

    def perturbations(self, n: int) -> int:
        return 2 * min(n, (self.zo.q or 2 * n) // 2)

    def begin(self, engine) -> None:
        self._d = engine.index.size

    def coordinates(self) -> np.ndarray:
        """The block's, sorted [at most K]."""
        order = torch.randperm(self._d, generator=generator(self.seed, "poll", self.poll)).numpy()
        return np.sort(order[self.block * self._size : (self.block + 1) * self._size])

    def evaluate(self, engine, coords: np.ndarray, step: int, piece: range) -> Tensor:
        """[len(piece), 2]: the differences by r and by -r."""
        part, largest = coords[piece.start : piece.stop], torch.finfo(engine.index.dtype).max
        found = torch.stack([engine.differences(part, self.radius), engine.differences(part, -self.radius)], 1)
        return found.nan_to_num(nan=largest, posinf=largest)

    def combine(self, engine, coords: np.ndarray, step: int, values: Tensor) -> Tensor:
        """The move [n]: 0, or r or -r for one coordinate."""
        position, down = divmod(int(np.argmin(values.cpu().numpy())), 2)
        move = torch.zeros(len(coords), dtype=values.dtype, device=values.device)
        if values[position, down] < 0:
            move[position] = -self.radius if down else self.radius
        return move

    def advance(self, estimate: Tensor) -> None:
        """The next block; after a move, or a whole poll that failed, the next poll."""
        self.block += 1
        failed = not estimate.any()
        if failed and self.block * self._size < self._d:
            return
        if failed:
            self.radius /= 2
            log.info("none of %d moves lowers the loss: the radius is now %g", 2 * self._d, self.radius)
        self.poll, self.block = self.poll + 1, 0

    def place(self, index: ParameterIndex, coords: np.ndarray, unit: int) -> str:
        return f"the difference at {index.describe(int(coords[unit]))}"

    def state(self) -> dict[str, Tensor]:
        return {
            "radius": torch.tensor(self.radius, dtype=torch.float64),
            "poll": torch.tensor(self.poll),
            "block": torch.tensor(self.block),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.radius, self.poll, self.block = float(state["radius"]), int(state["poll"]), int(state["block"])

    @property
    def _size(self) -> int:
        return min((self.zo.q or 2 * self._d) // 2, self._d)
