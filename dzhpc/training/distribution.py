"""Estimates over ranks: chunks, slices balanced by measured cost, scatter, the joined estimate (eq. 5), interruption."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dzhpc.errors import BlackBoxError
from dzhpc.job.shared_work import Cancellation
from dzhpc.job.world import World
from dzhpc.method.estimators import Estimator, Partial
from dzhpc.training.columns import Columns
from dzhpc.training.costs import BASE, DIRECTION, Costs
from dzhpc.training.dealing import deal, decoded, encoded, filled, pieces, reporters
from dzhpc.training.shards import Shards


class Interrupted(Exception):
    """Raised on all ranks together: an estimate was left unfinished; ``partial`` is what is known of it, on every rank.

    failure: what the black box of some rank died of; "" where there was another reason.
    """

    def __init__(self, partial: Partial | None, failure: str = ""):
        super().__init__("left unfinished")
        self.partial, self.failure = partial, failure


class Distribution:
    """Who evaluates what. The chunks follow from S alone, never from the rank count; only their owners change.

    The units of an estimate are numbered shard by shard: unit k of shard s is number s * units + k, and no piece crosses shards.
    urgent: asked between two pieces; once it is true on one rank, all ranks raise :class:`Interrupted`.
    """

    def __init__(self, world: World, task, urgent: Callable[[], bool] = lambda: False):
        self._world, self._engine, self._urgent = world, task.engine, urgent
        self.index = task.engine.index
        self.shards = Shards(task)
        self._cancellation = Cancellation(world)
        self._costs = Costs(task.engine)
        self.coords = np.zeros(0, np.int64)
        self.mine: list[range] = []  # the slice of this rank
        self._counters = world.counters() if task.config.run.take_over and world.size > 1 else None
        self._slices: list[list[range]] = []  # of all ranks, where they take over from each other
        self._evaluated: list[range] = []  # by this rank, of the last estimate
        self._reports: list[int] = []  # shards whose loss and buffers this rank tells the others
        self._units = 0  # of the last estimate, in a shard
        self.bad_unit: int | None = None  # the first of the last estimate whose number was not finite
        self._failure: BlackBoxError | None = None  # of this rank's black box, until all ranks know

    def assign(self, coords: np.ndarray | None, estimator: Estimator, partial: Partial | None = None) -> None:
        """Root cuts the work into pieces, deals those not in ``partial`` out to ranks by cost and scatters the slices.

        Collective; only root's ``coords`` and ``partial`` count.
        """
        world, told = self._world, None
        seconds = world.minimum(self._costs.seconds)
        if world.is_root:
            units, count = estimator.units(len(coords)), self.shards.count
            *cost, direction, base = filled(seconds)
            chunks, each = pieces(units, self._engine.at_once), np.full(units, direction)
            if estimator.by_coordinate:
                chunks, each = self._engine.cut(coords), np.array(cost)[self.index.owner(coords)]
            slices = deal(chunks, each, count, world.size, base if count > 1 else 0.0, partial)
            reports = reporters([{piece.start // units for piece in own} for own in slices], count)
            told = [encoded(own, reported) for own, reported in zip(slices, reports, strict=True)]
        self.coords = world.bcast_numbers(coords)
        self.mine, self._reports = decoded(world.scatter_numbers(told))
        if self._counters:
            ends = world.bcast_numbers(np.cumsum([len(one) for one in told]) if told else None)
            every = world.bcast_numbers(np.concatenate(told) if told else None)
            self._slices = [decoded(one)[0] for one in np.split(every, ends[:-1])]

    def estimate(self, estimator: Estimator, step: int, partial: Partial | None = None) -> tuple[float, Tensor]:
        """(loss at theta, the estimate on S [n] in the order of S): each rank's units, joined exactly, combined on all ranks.

        Raises Interrupted.
        """
        engine, coords, shards = self._engine, self.coords, self.shards
        self._units = n = estimator.units(len(coords))
        shards.begin(step)
        if n == 0:
            return self._without_units(estimator, step)

        def evaluate(piece: range) -> Tensor:
            self._use(piece.start // n)
            local = range(piece.start % n, (piece.stop - 1) % n + 1)
            return self._measured(local, estimator, lambda: estimator.evaluate(engine, coords, step, local))

        if shards.count == 1:  # all know the loss, whether they have a piece or not
            self.attempt(lambda: self._use(0))
        reports, taken = self._reports if shards.count > 1 else [], self._taken(self.mine, self._slices)
        values = self._joined(n * shards.count, taken, evaluate, partial, reports, estimator.numbers)
        rows = np.where(np.isin(np.arange(shards.count), reports)[:, None], shards.rows, 0)
        loss = shards.settle(self._world.join(rows) if shards.count > 1 else shards.rows)
        self.bad_unit = next(iter(np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1)).tolist()), None)
        values = torch.from_numpy(shards.average(values.reshape(shards.count, n, *values.shape[1:]))).to(engine.index.device)
        return loss, estimator.combine(engine, coords, step, values)

    def columns(
        self, estimator: Estimator, step: int, evaluate: Callable[[range], np.ndarray], partial: Partial | None
    ) -> tuple[float, Columns]:
        """(loss, ``evaluate(chunk)`` [len(chunk), 2 + M] of all chunks of S), of a batch in one shard. Raises Interrupted."""
        world, shards, n = self._world, self.shards, len(self.coords)
        self._units, self._evaluated = n, []
        shards.begin(step)
        self.attempt(lambda: self._use(0))
        known = np.flatnonzero(partial.done) if partial is not None and world.is_root else []
        found = [(known, partial.values[known])] if len(known) else []
        for chunk in self._taken(self.mine, self._slices):
            if self._leaves():
                break
            self._evaluated.append(chunk)
            part = self.attempt(lambda chunk=chunk: self._measured(chunk, estimator, lambda: evaluate(chunk)), None)
            if part is not None:
                found.append((np.arange(chunk.start, chunk.stop), part))
        if self._counters:
            self._counters.turn()
        self._costs.note()
        joined = np.zeros((n + 1, 3), torch.empty(0, dtype=self.index.dtype).numpy().dtype)
        for places, values in found:
            joined[places, :2], joined[places, 2] = values[:, :2], world.rank + 1
        joined[n] = self._cancellation.cancelled()
        joined = world.join(joined)
        columns = Columns(found, joined[:n, :2], joined[:n, 2].astype(np.int64) - 1)
        if joined[n, 0] > 0:
            raise Interrupted(columns.partial(world), self.failure())
        self.bad_unit = next(iter(np.flatnonzero(~np.isfinite(columns.joined[:, 0])).tolist()), None)
        return shards.settle(shards.rows), columns

    def _without_units(self, estimator: Estimator, step: int) -> tuple[float, Tensor]:
        """As :meth:`estimate`, for an estimator that makes all of it from a bound batch: the ranks share shards."""
        engine, shards, nothing = self._engine, self.shards, torch.zeros(0, dtype=self.index.dtype)
        if shards.count == 1:
            shards.use(0)
            return shards.settle(shards.rows), estimator.combine(engine, self.coords, step, nothing)

        def combined(mine: range) -> np.ndarray:
            found = []
            for shard in mine:
                shards.use(shard)
                found.append(estimator.combine(engine, self.coords, step, nothing).cpu().numpy())
            return np.array(found, nothing.numpy().dtype).reshape(len(mine), len(self.coords))

        values = self._world.split(shards.count, combined)
        loss = shards.settle(self._world.split(shards.count, lambda mine: shards.rows[mine]))
        return loss, torch.from_numpy(shards.average(values)).to(engine.index.device)

    def place(self, unit: int, estimator: Estimator) -> str:
        """What an error calls a unit."""
        shard, k = divmod(unit, self._units)
        return estimator.place(self.index, self.coords, k) + (f" on shard {shard} of the batch" if self.shards.count > 1 else "")

    def _use(self, shard: int) -> None:
        """Bind a shard, and note what that costs."""
        if shard != self.shards.bound:
            self._costs.timed([BASE], 1, lambda: self.shards.use(shard))

    def _measured(self, piece: range, estimator: Estimator, evaluate: Callable[[], np.ndarray | Tensor]) -> np.ndarray | Tensor:
        """``evaluate()``, and what a coordinate of its parameter, or a direction, costs."""
        owners = self.index.owner(self.coords[piece.start : piece.stop]) if estimator.by_coordinate else [DIRECTION]
        return self._costs.timed(owners, len(piece), evaluate)

    def split(self, n: int, evaluate: Callable[[range], np.ndarray]) -> np.ndarray:
        """``evaluate(indices)`` [len(indices)] for all of 0..n-1, shared out and joined on all ranks [n]. Raises Interrupted.

        Each rank has neighbouring ones.
        """
        parts, ranks, slices = pieces(n, self._engine.at_once), self._world.size, [[] for _ in range(self._world.size)]
        for k, piece in enumerate(parts):
            slices[k * ranks // len(parts)].append(piece)
        return self._joined(n, self._taken(slices[self._world.rank], slices), evaluate)

    def _taken(self, mine: list[range], slices: list[list[range]]) -> Iterator[range]:
        """The pieces that this rank evaluates: its own; then, where ranks take over, what others have not begun."""
        if self._counters is None:
            yield from mine
            return
        rank, size = self._world.rank, self._world.size
        for owner in [(rank + k) % size for k in range(size)]:
            while (k := self._counters.next(owner)) < len(slices[owner]):
                yield slices[owner][k]

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

    def owner_of(self, unit: int) -> int:
        """The rank that evaluates a unit of an estimate that was not interrupted. Collective."""
        return self._world.maximum(self._world.rank if any(unit in piece for piece in self._evaluated) else -1)

    def _joined(
        self,
        n: int,
        taken: Iterable[range],
        evaluate: Callable[[range], np.ndarray | Tensor],
        partial: Partial | None = None,
        reports: Sequence[int] = (),
        numbers: int = 1,
    ) -> np.ndarray:
        """Evaluate the pieces that this rank takes, bind what else it reports, join all: [n], or [n, numbers]. Collective.

        A GPU is waited for once, when all of its work is given out.
        """
        world, found = self._world, []
        sent = np.zeros(n * numbers + 1, torch.empty(0, dtype=self.index.dtype).numpy().dtype)
        values, done = sent[:-1].reshape(n, numbers) if numbers > 1 else sent[:-1], np.zeros(n, bool)
        self._evaluated = []
        for piece in taken:
            if self._leaves():
                break
            self._evaluated.append(piece)
            part = self.attempt(lambda piece=piece: evaluate(piece), None)
            if part is not None:
                found.append((piece, torch.as_tensor(part)))
        for shard in reports:
            if not any(piece.start // self._units == shard for piece in self._evaluated) and not self._leaves():
                self.attempt(lambda shard=shard: self._use(shard))
        if self._counters:
            self._counters.turn()
        if found:
            where = np.concatenate([np.arange(piece.start, piece.stop) for piece, _ in found])
            values[where], done[where] = torch.cat([part for _, part in found]).cpu().numpy(), True
        self._costs.note()
        sent[-1] = self._cancellation.cancelled()  # travels with the others: without an interruption it costs no message
        joined = world.join(sent)
        unfinished, joined = joined[-1] > 0, joined[:-1].reshape(values.shape)
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
