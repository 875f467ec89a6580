"""Estimates over ranks: chunks, slices balanced by measured cost, scatter, the joined estimate (eq. 5), interruption."""

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dzhpc.errors import BlackBoxError
from dzhpc.job import device as devices
from dzhpc.job.world import World
from dzhpc.method import estimators
from dzhpc.method.coordinates import balance
from dzhpc.method.estimators import Partial

PIECES = 128  # directions are shared out in so many pieces at most, of at most ``engine.at_once``


class Interrupted(Exception):
    """Raised on all ranks together: an estimate was left unfinished; ``partial`` is what is known of it, on every rank.

    failure: what the black box of some rank died of; "" where there was another reason.
    """

    def __init__(self, partial: Partial | None, failure: str = ""):
        super().__init__("left unfinished")
        self.partial, self.failure = partial, failure


class Distribution:
    """Who evaluates what. The chunks follow from S alone, never from the rank count; only their owners change.

    Cost: seconds per coordinate of each parameter, the least that any rank has measured so far: the first time may compile.
    urgent: asked between two chunks; once it is true on one rank, all ranks raise :class:`Interrupted`.
    """

    def __init__(self, world: World, engine, urgent: Callable[[], bool] = lambda: False):
        self._world, self._engine, self._urgent = world, engine, urgent
        self._seconds = np.full(len(engine.index.names), np.inf)
        self.coords = np.zeros(0, np.int64)
        self.mine: list[range] = []
        self.bad_direction: int | None = None  # the first of the last RGE whose difference was not finite
        self._failure: BlackBoxError | None = None  # of this rank's black box, until all ranks know

    def assign(self, coords: np.ndarray | None, partial: Partial | None = None) -> None:
        """Root cuts S into chunks, balances those not in ``partial`` by cost and scatters the slices.

        Collective; only root's arguments count.
        """
        world, pieces = self._world, None
        seconds = world.gather(self._seconds)
        if world.is_root:
            cost = self._cost_per_coordinate(np.min(seconds, axis=0))
            chunks = _missing(self._engine.cut(coords), partial)
            owners = self._engine.index.owner(coords)
            slices = balance([float(cost[owners[chunk]].sum()) for chunk in chunks], world.size)
            pieces = [[chunks[k] for k in part] for part in slices]
        self.coords = world.bcast(coords)
        self.mine = world.scatter(pieces)

    def cge(self, mu: float, difference: str, partial: Partial | None = None) -> Tensor:
        """The estimate on S [n], in the order of S: each rank's slice, joined exactly. Raises Interrupted."""
        index = self._engine.index

        def evaluate(chunk: range) -> np.ndarray:
            part = self.coords[chunk.start : chunk.stop]
            start = time.perf_counter()
            values = estimators.cge(self._engine, part, mu, difference).cpu().numpy()
            devices.synchronize(index.device)
            owners = index.owner(part)
            np.minimum.at(self._seconds, owners, (time.perf_counter() - start) / len(part))
            return values

        return torch.from_numpy(self._joined(len(self.coords), self.mine, evaluate, partial)).to(index.device)

    def rge(self, q: int, mu: float, seed: int, difference: str, partial: Partial | None = None) -> Tensor:
        """RGE restricted to S [n]: the ranks share the directions, q scalars travel. Raises Interrupted."""
        engine = self._engine

        def evaluate(mine: range) -> np.ndarray:
            return estimators.rge_slopes(engine, mine, mu, seed, self.coords, difference).cpu().numpy()

        slopes = torch.from_numpy(self.split(q, evaluate, partial)).to(engine.index.device)
        self.bad_direction = next(iter((~torch.isfinite(slopes)).nonzero().flatten().tolist()), None)
        return estimators.rge_sum(slopes, seed, self.coords, engine.index)

    def split(self, n: int, evaluate: Callable[[range], np.ndarray], partial: Partial | None = None) -> np.ndarray:
        """``evaluate(indices)`` [len(indices)] for all of 0..n-1, shared out and joined on all ranks [n]. Raises Interrupted."""
        pieces = _missing(self._pieces(n), partial)
        return self._joined(n, pieces[self._world.rank :: self._world.size], evaluate, partial)

    def attempt(self, ask: Callable, otherwise=math.nan):
        """``ask()``, what each rank does by itself; where its black box fails, ``otherwise``, and all leave the next estimate."""
        try:
            return ask()
        except BlackBoxError as error:
            self._failure = error
            self._world.call_off()
            return otherwise

    def failure(self) -> str:
        """What a black box failed of in :meth:`attempt`, on all ranks; "" if none did. Collective: all have left."""
        self._world.settle()
        failure, self._failure = self._failure, None
        return self._world.first_message(failure)

    def owner_of(self, position: int) -> int:
        """The rank that evaluates a position of S. Collective."""
        return self._world.maximum(self._world.rank if any(position in chunk for chunk in self.mine) else -1)

    def owner_of_direction(self, direction: int, q: int) -> int:
        """The rank that evaluates a direction of an RGE that was not interrupted."""
        return next(k for k, piece in enumerate(self._pieces(q)) if direction in piece) % self._world.size

    def _pieces(self, n: int) -> list[range]:
        size = max(1, min(self._engine.at_once, -(-n // PIECES)))
        return [range(k, min(k + size, n)) for k in range(0, n, size)]

    def _joined(self, n: int, mine: list[range], evaluate: Callable[[range], np.ndarray], partial: Partial | None) -> np.ndarray:
        """Evaluate this rank's pieces, join all [n]. Collective."""
        world = self._world
        values = np.zeros(n + 1, torch.empty(0, dtype=self._engine.index.dtype).numpy().dtype)
        done = np.zeros(n, bool)
        for piece in mine:
            if self._leaves():
                break
            part = self.attempt(lambda piece=piece: evaluate(piece), None)
            if part is not None:
                values[piece.start : piece.stop] = part
                done[piece.start : piece.stop] = True
        values[n] = world.called_off()  # travels with the others: without an interruption it costs no message
        joined = world.join(values)
        unfinished, joined = joined[n] > 0, joined[:n]
        if partial is not None:
            joined[partial.done] = partial.values[partial.done]
        if unfinished:
            done = world.join(done.astype(np.uint8)) > 0
            raise Interrupted(Partial(joined, done if partial is None else done | partial.done), self.failure())
        return joined

    def _leaves(self) -> bool:
        if self._urgent():
            self._world.call_off()
        return self._world.called_off()

    @staticmethod
    def _cost_per_coordinate(seconds: np.ndarray) -> np.ndarray:
        """Measured where there is a measurement, else the mean of those; equal before the first step."""
        known = np.isfinite(seconds)
        return np.where(known, seconds, seconds[known].mean() if known.any() else 1.0)


def _missing(pieces: list[range], partial: Partial | None) -> list[range]:
    """The pieces of which anything is still to be evaluated; always whole ones, since their cut may decide the bits."""
    if partial is None:
        return pieces
    return [piece for piece in pieces if not partial.done[piece.start : piece.stop].all()]
