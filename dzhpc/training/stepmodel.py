"""A model of a training step on any number of ranks and shards, from a few timed pieces of it on one rank.

T(R, n) = max over ranks [ base passes of its shards + its chunks ] + join + update: the slices are those that
:func:`dzhpc.training.dealing.deal` makes for R ranks, so that whole chunks leave ranks waiting here as they do in a run.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.modules.batchnorm import _NormBase

from dzhpc.engines.pinned import Pinned
from dzhpc.job import device as devices
from dzhpc.job.world import World
from dzhpc.method.estimators import Estimator
from dzhpc.method.optimizers import make_optimizer
from dzhpc.tasks import Task
from dzhpc.training.dealing import deal, pieces

CHUNKS = 12  # timed, spread evenly over the network
WHOLE_S = 2.0  # a shard whose queries take less is timed whole, in the order of a run: caches then hold what they hold there
PASSES = 5  # over those, at most, and within WHOLE_S but for the first two
SMALLEST = 32  # examples in a shard that the model proposes where a BatchNorm sees them: fewer are too few for it
MOST = 32  # shards that it proposes
RANKS = [2**k for k in range(15)]


@dataclass(frozen=True)
class Network:
    """What a message costs. latency: seconds. bandwidth: bytes per second."""

    name: str
    latency: float
    bandwidth: float

    def join_s(self, ranks: int, size: float) -> float:
        """Seconds of an Allreduce of ``size`` bytes: reduce-scatter and allgather, log2 R messages each (Rabenseifner)."""
        rounds = math.ceil(math.log2(ranks)) if ranks > 1 else 0
        return 2 * (rounds * self.latency + size * (ranks - 1) / ranks / self.bandwidth) if rounds else 0.0


INFINIBAND = Network("assumed, InfiniBand: 3 us, 10 GB/s", 3e-6, 10e9)
ETHERNET = Network("assumed, Ethernet: 50 us, 1 GB/s", 50e-6, 1e9)


def measured_network(world: World) -> Network | None:
    """Latency and bandwidth between the ranks of this job, by Allreduces of 4 bytes and 4 MiB; None for one rank. Collective."""
    if world.size == 1:
        return None
    seconds = {}
    for size in (1, 2**20):
        array, found = np.zeros(size, np.float32), []
        for _ in range(8):
            world.maximum(0)  # all begin together
            start = time.perf_counter()
            world.join(array)
            found.append(time.perf_counter() - start)
        seconds[size] = min(found[2:])
    rounds = math.ceil(math.log2(world.size))
    latency = world.minimum(np.array([seconds[1] / 2 / rounds]))[0]
    large = max(1e-9, world.minimum(np.array([seconds[2**20]]))[0] - 2 * rounds * latency)
    bandwidth = 2 * 2**22 * (world.size - 1) / world.size / large
    return Network(f"measured on {world.size} ranks: {1e6 * latency:.1f} us, {bandwidth / 1e9:.2g} GB/s", latency, bandwidth)


@dataclass(frozen=True)
class Shard:
    """What one rank was timed at, the batch in ``count`` parts: seconds of a base pass, chunks of units, seconds of each unit."""

    count: int
    base_s: float
    chunks: list[range]
    each: np.ndarray

    @property
    def work_s(self) -> float:
        """Of all queries of a step on one rank."""
        return float(self.each.sum()) * self.count


@dataclass(frozen=True)
class Step:
    """Seconds of a step on some ranks: what its slowest rank does, and what comes on top for all."""

    ranks: int
    shards: int
    base_s: float  # of the slowest rank
    queries_s: float  # the mean over ranks
    waiting_s: float  # for the slowest rank, by the mean one
    join_s: float
    update_s: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.base_s + self.queries_s + self.waiting_s + self.join_s + self.update_s

    @property
    def bottleneck(self) -> str:
        """What, beside the queries, takes most."""
        parts = {"base pass": self.base_s, "whole chunks": self.waiting_s, "join": self.join_s, "update": self.update_s}
        name = max(parts, key=parts.get)
        return name if parts[name] > 0.01 * self.seconds else "queries"


@dataclass(frozen=True)
class StepModel:
    """What a step needs, as timed on one rank. buffers: numbers in the model's buffers, which travel with a shard's loss.

    solve: ranks -> seconds of what the optimiser shares out.
    """

    shards: dict[int, Shard]
    buffers: int
    update_s: float
    network: Network
    bytes_each: int
    solve: Callable[[int], float] = lambda ranks: 0.0

    def slices(self, ranks: int, count: int) -> list[list[range]]:
        """The pieces of each rank."""
        shard = self.shards[count]
        return deal(shard.chunks, shard.each, count, ranks, shard.base_s if count > 1 else 0.0)

    def step(self, ranks: int, count: int, draw: Callable[[np.ndarray], np.ndarray] = lambda expected: expected) -> Step:
        """The step on so many ranks. draw: what chunks of these expected seconds really take (an event simulation draws them)."""
        shard = self.shards[count]
        units, ends = len(shard.each), np.concatenate([[0.0], np.cumsum(shard.each)])
        bases, busy = np.zeros(ranks), np.zeros(ranks)
        for rank, own in enumerate(self.slices(ranks, count)):
            starts = np.array([piece.start % units for piece in own], int)
            lengths = np.array([len(piece) for piece in own], int)
            busy[rank] = draw(ends[starts + lengths] - ends[starts]).sum()
            groups = len({piece.start // units for piece in own}) if units else count
            bases[rank] = draw(np.full(groups if count > 1 else 1, shard.base_s)).sum()
        slowest = int(np.argmax(bases + busy))
        total = float((bases + busy)[slowest])
        size = self.bytes_each * count * units + (8 * count * (1 + self.buffers) if count > 1 else 0)
        base, mean = float(bases[slowest]), min(float(busy.mean()), float(busy[slowest]))
        return Step(
            ranks, count, base, mean, total - base - mean, self.network.join_s(ranks, size), self.update_s + self.solve(ranks)
        )

    def best(self, ranks: int) -> Step:
        """The step with the number of shards that makes it shortest; fewer where that costs less than 2 %."""
        steps = [self.step(ranks, count) for count in self.shards]
        shortest = min(step.seconds for step in steps)
        return next(step for step in steps if step.seconds <= 1.02 * shortest)

    def efficiency(self, step: Step, one: Step) -> float:
        """The seconds of ``one``, a step on one rank, over the rank-seconds of this one."""
        return one.seconds / (step.ranks * step.seconds)


def measure(
    task: Task, estimator: Estimator, coords: np.ndarray, network: Network, every: bool, solve: Callable[[int], float]
) -> StepModel:
    """Time a task's base pass, a few chunks, and an update. every: for all numbers of shards that make sense.

    Parameters, buffers and random numbers are left as they were. A black box is asked for it.
    """
    shards = {}
    for count in sorted({task.config.data.shards, *(possible(task) if every and task.in_shards else [])}):
        with _shards(task, count), Pinned(task.model, task.engine.index.device).unchanged():
            shards[count] = _timed(task, estimator, coords, count)
    buffers = sum(b.numel() for b in task.model.buffers())
    update_s = 0.0 if task.config.optim.name == "gauss-newton" else _update_s(task)
    return StepModel(shards, buffers, update_s, network, task.engine.index.parameters[0].element_size(), solve)


def possible(task: Task) -> list[int]:
    """Numbers of shards that make sense, each at least twice the one before. A batch is bound."""
    norms = [m for m in task.model.modules() if isinstance(m, _NormBase)]
    smallest = SMALLEST if any(m.training or m.running_mean is None for m in norms) else 1
    size, found = task.config.data.batch_size, [1]
    for n in range(2, min(MOST, size // smallest) + 1):
        if size % n == 0 and n >= 2 * found[-1]:
            found.append(n)
    return found


@contextmanager
def _shards(task: Task, count: int) -> Iterator[None]:
    given = task.config.data.shards
    task.config.data.shards = count
    try:
        yield
    finally:
        task.config.data.shards = given


def _timed(task: Task, estimator: Estimator, coords: np.ndarray, count: int) -> Shard:
    engine, units = task.engine, estimator.units(len(coords))
    task.bind(0)  # warm-up: tracing, caches
    base_s = seconds(task, lambda: task.bind(0))
    if units == 0:
        nothing, shared = torch.zeros(0, dtype=engine.index.dtype), task.shared
        work = (lambda: shared.rows(range(shared.parts), 0)) if shared else lambda: estimator.combine(engine, coords, 0, nothing)
        return Shard(count, base_s + seconds(task, work), [], np.zeros(0))
    chunks = engine.cut(coords) if estimator.by_coordinate else pieces(units, engine.at_once)
    picked = sorted({int(k) for k in np.linspace(0, len(chunks) - 1, CHUNKS)})
    each = []
    for k in picked:
        evaluate = lambda chunk=chunks[k]: estimator.evaluate(engine, coords, 0, chunk)  # noqa: E731
        evaluate()  # compiles what has to be compiled
        each.append(seconds(task, evaluate) / len(chunks[k]))
    lengths = [len(chunk) for chunk in chunks]
    of_units = np.repeat(np.interp(range(len(chunks)), picked, each), lengths)
    if task.cost.evaluation or of_units.sum() > WHOLE_S:  # a black box is not asked a whole step for a forecast
        return Shard(count, base_s, chunks, of_units)
    passes, start = [], time.perf_counter()
    while len(passes) < 2 or (len(passes) < PASSES and time.perf_counter() - start < WHOLE_S):
        base = seconds(task, lambda: task.bind(0), tries=1)
        work = [seconds(task, lambda c=chunk: estimator.evaluate(engine, coords, 0, c), tries=1) for chunk in chunks]
        passes.append([base, *work])
    base_s, *of_chunks = np.median(passes, 0)
    return Shard(count, float(base_s), chunks, np.repeat(np.array(of_chunks) / lengths, lengths))


def _update_s(task: Task) -> float:
    copies = {name: p.detach().clone() for name, p in zip(task.engine.index.names, task.engine.index.parameters, strict=True)}
    optimizer = make_optimizer(task.config.optim, copies)
    for p in copies.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return seconds(task, optimizer.step)


def seconds(task: Task, work: Callable[[], object], tries: int = 2) -> float:
    """The least of some tries, a compiler's time left out."""
    found = []
    for _ in range(tries):
        compiled_before, start = task.engine.compile_s, time.perf_counter()
        work()
        devices.synchronize(task.engine.index.device)
        found.append(time.perf_counter() - start - (task.engine.compile_s - compiled_before))
    return max(1e-9, min(found))
