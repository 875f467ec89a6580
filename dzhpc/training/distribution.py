"""Estimates over ranks: chunks, slices balanced by measured cost, scatter, the joined estimate (eq. 5), interruption."""

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dzhpc.errors import BlackBoxError
from dzhpc.job import device as devices
from dzhpc.job.shared_work import Cancellation
from dzhpc.job.world import World
from dzhpc.method.coordinates import balance
from dzhpc.method.estimators import Estimator, Partial

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
        self._world, self._engine, self._urgent, self.index = world, engine, urgent, engine.index
        self._cancellation = Cancellation(world)
        self._seconds = np.full(len(engine.index.names), np.inf)
        self.coords = np.zeros(0, np.int64)
        self.mine: list[range] = []
        self.bad_unit: int | None = None  # the first of the last estimate whose number was not finite
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

    def estimate(self, estimator: Estimator, step: int, partial: Partial | None = None) -> Tensor:
        """The estimate on S [n], in the order of S: each rank's units, joined exactly, combined on all. Raises Interrupted."""
        engine, coords, n = self._engine, self.coords, estimator.units(len(self.coords))

        def evaluate(piece: range) -> np.ndarray:
            return estimator.evaluate(engine, coords, step, piece).cpu().numpy()

        if n == 0:  # nothing to join
            return estimator.combine(engine, coords, step, torch.zeros(0, dtype=engine.index.dtype))
        if estimator.by_coordinate:
            values = self._joined(n, self.mine, lambda chunk: self._measured(chunk, evaluate), partial)
        else:
            values = self.split(n, evaluate, partial)
        values = torch.from_numpy(values).to(engine.index.device)
        self.bad_unit = next(iter((~torch.isfinite(values)).nonzero().flatten().tolist()), None)
        return estimator.combine(engine, coords, step, values)

    def _measured(self, chunk: range, evaluate: Callable[[range], np.ndarray]) -> np.ndarray:
        """``evaluate(chunk)``, and what a coordinate of its parameter costs; a compiler's time is no part of that."""
        index, compiled_before, start = self._engine.index, self._engine.compile_s, time.perf_counter()
        values = evaluate(chunk)
        devices.synchronize(index.device)
        seconds = time.perf_counter() - start - (self._engine.compile_s - compiled_before)
        owners = index.owner(self.coords[chunk.start : chunk.stop])
        np.minimum.at(self._seconds, owners, max(seconds, 1e-9) / len(chunk))
        return values

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
            self._cancellation.cancel()
            return otherwise

    def failure(self) -> str:
        """What a black box failed of in :meth:`attempt`, on all ranks; "" if none did. Collective: all have left."""
        self._cancellation.drain()
        failure, self._failure = self._failure, None
        return self._world.first_message(failure)

    def owner_of(self, unit: int, estimator: Estimator) -> int:
        """The rank that evaluates a unit of an estimate that was not interrupted. Collective."""
        if estimator.by_coordinate:
            return self._world.maximum(self._world.rank if any(unit in chunk for chunk in self.mine) else -1)
        pieces = self._pieces(estimator.units(len(self.coords)))
        return next(k for k, piece in enumerate(pieces) if unit in piece) % self._world.size

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
        values[n] = self._cancellation.cancelled()  # travels with the others: without an interruption it costs no message
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
            self._cancellation.cancel()
        return self._cancellation.cancelled()

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
