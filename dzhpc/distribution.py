"""Sparse-CGE over ranks: chunks, slices balanced by measured cost, scatter, and the joined estimate (eq. 5)."""

import time

import numpy as np
import torch
from torch import Tensor

from dzhpc import device as devices
from dzhpc import estimators
from dzhpc.coordinates import balance
from dzhpc.spmd import World


class Distribution:
    """Who evaluates what. The chunks follow from S alone, never from the rank count; only their owners change.

    Cost: seconds per coordinate of each parameter, measured by every rank in the steps so far.
    """

    def __init__(self, world: World, engine):
        self._world, self._engine = world, engine
        self._seconds = np.zeros(len(engine.index.names))
        self._counts = np.zeros(len(engine.index.names))
        self.coords = np.zeros(0, np.int64)
        self.mine: list[range] = []
        self.bad_direction: int | None = None  # the first of the last RGE whose difference was not finite

    def assign(self, coords: np.ndarray | None) -> None:
        """Root cuts S into chunks, balances them by cost and scatters the slices. Collective; only root's ``coords`` count."""
        world, pieces = self._world, None
        seconds, counts = (world.gather(a) for a in (self._seconds, self._counts))
        if world.is_root:
            cost = self._cost_per_coordinate(sum(seconds), sum(counts))
            chunks = self._engine.cut(coords)
            owners = self._engine.index.owner(coords)
            slices = balance([float(cost[owners[chunk]].sum()) for chunk in chunks], world.size)
            pieces = [[chunks[k] for k in part] for part in slices]
        self.coords = world.bcast(coords)
        self.mine = world.scatter(pieces)

    def cge(self, mu: float, difference: str) -> Tensor:
        """The estimate on S [n], in the order of S: each rank's slice, joined exactly."""
        index = self._engine.index
        values = np.zeros(len(self.coords), torch.empty(0, dtype=index.dtype).numpy().dtype)
        for chunk in self.mine:
            part = self.coords[chunk.start : chunk.stop]
            start = time.perf_counter()
            values[chunk.start : chunk.stop] = estimators.cge(self._engine, part, mu, difference).cpu().numpy()
            devices.synchronize(index.device)
            owners = index.owner(part)
            np.add.at(self._seconds, owners, (time.perf_counter() - start) / len(part))
            np.add.at(self._counts, owners, 1)
        return torch.from_numpy(self._world.join(values)).to(index.device)

    def rge(self, q: int, mu: float, seed: int, difference: str) -> Tensor:
        """RGE restricted to S [n]: the ranks share the directions, q scalars travel."""
        engine = self._engine

        def evaluate(mine: range) -> np.ndarray:
            return estimators.rge_slopes(engine, mine, mu, seed, self.coords, difference).cpu().numpy()

        slopes = torch.from_numpy(self._world.split(q, evaluate)).to(engine.index.device)
        self.bad_direction = next(iter((~torch.isfinite(slopes)).nonzero().flatten().tolist()), None)
        return estimators.rge_sum(slopes, seed, self.coords, engine.index)

    def owner_of(self, position: int) -> int:
        """The rank that evaluates a position of S. Collective."""
        return self._world.maximum(self._world.rank if any(position in chunk for chunk in self.mine) else -1)

    @staticmethod
    def _cost_per_coordinate(seconds: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Measured where there is a measurement, else the mean of those; equal before the first step."""
        known = counts > 0
        cost = np.ones(len(counts))
        if known.any():
            cost[known] = seconds[known] / counts[known]
            cost[~known] = cost[known].mean()
        return cost
