"""A Gauss-Newton step over ranks: who evaluates a coordinate keeps its column; the small system is put together and solved once.

The slopes are joined on all ranks. H is a sum over PARTS of the outputs: each part's columns are sent to one rank, which
multiplies them, and the root adds the products up in order; it solves, and all get the step. So bits depend on no rank.
"""

import logging
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dzhpc.config import Config
from dzhpc.errors import InputError, NumericalError
from dzhpc.job.world import World
from dzhpc.method import gauss_newton as method
from dzhpc.method.estimators import Estimator, Partial
from dzhpc.method.optimizers import GaussNewton
from dzhpc.tasks import Task
from dzhpc.training.columns import Columns, slices
from dzhpc.training.distribution import Distribution, Interrupted

log = logging.getLogger("dzhpc")
NETWORK = 1e9  # bytes a second that ranks send one another, for a forecast
LEAST_SKETCH = 4  # numbers a coordinate, where memory has no room for all outputs


class Newton:
    """What the trainer does with ``optim.name = "gauss-newton"``, in place of an estimate and its update.

    ``solve_s``: seconds spent on the small system so far, by the rank that took longest in each part.
    """

    def __init__(self, world: World, task: Task, distribution: Distribution, optimizer: GaussNewton):
        self._world, self._task, self._distribution, self._optimizer = world, task, distribution, optimizer
        self._config, self._index = task.config, task.engine.index
        self._columns: Columns | None = None
        self._size = 0  # M: the numbers of a column
        self._loss = math.nan  # at theta
        self._still = False  # whether it was said that there is nothing to gain
        self._averages: dict[str, Tensor] = {}  # what the optimiser is to keep once the step is made
        self.solve_s = 0.0

    @property
    def diagonal(self) -> Tensor:
        """diag H of the last estimate [n], on all ranks."""
        return torch.from_numpy(self._columns.joined[:, 1])

    def estimate(self, estimator: Estimator, step: int, partial: Partial | None) -> tuple[float, Tensor]:
        """(loss at theta, the gradient J^T r on S [n]) on all ranks, see :meth:`Distribution.estimate`. Raises Interrupted."""
        zo, engine, coords = self._config.zo, self._task.engine, self._distribution.coords
        sketches: list[method.Sketch | None] = []

        def evaluate(piece: range) -> np.ndarray:
            if not sketches:  # the batch is bound
                size = sketched(self._config, len(coords), rows := engine.curvature.size)
                sketches.append(method.Sketch(rows, size, self._config.run.seed, step) if size < rows else None)
            return method.columns(engine, coords[piece.start : piece.stop], zo.mu, zo.difference, sketches[0]).cpu().numpy()

        self._loss, self._columns = self._distribution.columns(estimator, step, evaluate, partial)
        self._size = sketched(self._config, len(coords), engine.curvature.size)
        return self._loss, torch.from_numpy(self._columns.joined[:, 0].copy()).to(self._index.device)

    def step(self) -> tuple[Tensor, int]:
        """(minus the step on S [n] in the parameters' dtype, how often the loss of a trial was asked for). Raises Interrupted."""
        start, before = time.perf_counter(), self._world.comm_s
        system, optim, state = self._system(), self._config.optim, self._optimizer.curvature
        self.solve_s += time.perf_counter() - start - (self._world.comm_s - before)
        damping = float(state["damping"])
        for asked in range(method.TRIES):
            delta, gain, predicted, least = self._solved(system, damping)
            if not optim.adapt:
                state.update(self._averages)
                return -delta, 0
            if not gain < -method.SMALLEST * abs(self._loss):
                if not self._still:
                    log.info("no step is expected to lower the loss of its batch by more than %g of it", method.SMALLEST)
                self._still = True
                damping, tried = optim.damping, asked  # what it was led to says nothing of other batches
                break
            change = self._change(delta)
            damping, tried = max(least, method.next_damping(damping, change, predicted)), asked + 1
            if change < 0:
                break
        else:
            log.info("no step lowers the loss of its batch, with lambda up to %.3g", damping)
        state.update(self._averages, damping=torch.tensor(damping, dtype=torch.float64))
        if tried and change < 0:
            return -delta, tried
        self._optimizer.rest()
        return torch.zeros_like(delta), tried

    def _solved(self, system: method.System | None, damping: float) -> tuple[Tensor, float, float, float]:
        """(delta [n] in the parameters' dtype, what lr delta should change the loss by, what all that is added on S should,
        the least lambda), from the root's system."""
        start, before = time.perf_counter(), self._world.comm_s

        def solve() -> np.ndarray:
            delta = system.within(damping, self._config.optim.trust)
            gain = system.predicted(delta, self._optimizer.param_groups[0]["lr"])
            added = self._added(delta.to(self._index.dtype))[torch.from_numpy(self._distribution.coords)]
            predicted = system.predicted(added.cpu().double(), 1.0)
            return np.concatenate([[gain, predicted, method.LOWEST * system.scale], delta.numpy()])

        found = self._world.numbers_of_root(solve, 3 + len(self._distribution.coords))
        (gain, predicted, least), delta = found[:3].tolist(), torch.from_numpy(found[3:])
        self.solve_s += time.perf_counter() - start - (self._world.comm_s - before)
        if not torch.isfinite(delta).all():
            raise NumericalError("the Gauss-Newton step is not finite: raise optim.damping")
        return delta.to(self._index.device, self._index.dtype), gain, predicted, least

    def _added(self, delta: Tensor) -> Tensor:
        """What a step adds to theta [d], momentum and weight decay included."""
        flat = torch.zeros(self._index.size, dtype=self._index.dtype, device=self._index.device)
        flat[torch.from_numpy(self._distribution.coords).to(flat.device)] = delta.to(flat.device)
        return self._index.flatten(self._optimizer.move(list(self._index.split(flat).values())))

    def _change(self, delta: Tensor) -> float:
        """How the loss of the batch changes at the theta that a step leads to; the root asks. Raises Interrupted."""
        move = self._added(delta)

        def ask() -> tuple[float, float]:
            return 1.0, float(self._task.engine.directional([move], 1.0)[0])

        answered, change = self._world.numbers_of_root(lambda: self._distribution.attempt(ask, (0.0, 0.0)), 2).tolist()
        if not answered:
            failure = self._distribution.failure()
            raise Interrupted(self._columns.partial(self._world), failure)
        return change if math.isfinite(change) else math.inf

    def _system(self) -> method.System | None:
        """The averaged system of this step, on the root."""
        columns, optim, n = self._columns, self._config.optim, len(self._distribution.coords)
        averages = optim.average_curvature > 0
        small = self._size < n and not averages
        gathered = columns.whole(self._world) if small else None
        hessian = None if small else self._hessian(columns)
        if not self._world.is_root:
            return None
        scalars = torch.from_numpy(columns.joined).double()
        now = {"gradient": scalars[:, 0]} | ({} if small else {"hessian": hessian})
        if averages or optim.average_gradient > 0:
            keep = {"hessian": optim.average_curvature, "gradient": optim.average_gradient}
            now = method.averaged(self._optimizer.curvature, self._distribution.coords, now, keep)
            kept = {name: now[name] for name in ("hessian", "gradient", "coordinates") if name != "hessian" or averages}
            self._averages = {name: t.clone() for name, t in kept.items()}
        diagonal = scalars[:, 1] if small else now["hessian"].diagonal().clone()
        return method.System(now["gradient"], diagonal, optim.damping_kind, now.get("hessian"), gathered)

    def _hessian(self, columns: Columns) -> Tensor | None:
        """A A^T [n, n] float64 on the root."""
        world, pieces, n = self._world, method.parts(self._size), len(columns.joined)
        total = torch.zeros(n, n, dtype=torch.float64) if world.is_root else None
        for first in range(0, len(pieces), world.size):
            now = pieces[first : first + world.size]
            block = columns.part(world, now)
            product = torch.zeros(0, n, dtype=torch.float64) if block is None else method.gram(block)
            for rows in slices(n, 8 * n * world.size):
                counts = np.where(np.arange(world.size) < len(now), (rows.stop - rows.start) * n, 0)
                found = world.gather_numbers(product[rows].numpy(), counts)
                for one in () if found is None else found.reshape(len(now), -1, n):
                    total[rows] += torch.from_numpy(one)
        return total


def sketched(config: Config, n: int, rows: int) -> int:
    """How many numbers of the ``rows`` outputs are kept: M, or the size of the sketch. A function of the input and |S| alone."""
    optim = config.optim
    size = min(rows, optim.sketch * n) if optim.sketch else rows
    if 4 * n * size > optim.memory_mb * 2**20:
        size = min(size, LEAST_SKETCH * n)
    return size


def needed(config: Config, n: int, rows: int, itemsize: int) -> int:
    """Bytes of a step on n coordinates, in all ranks together: the Jacobian once, and a few matrices of the small system."""
    size = sketched(config, n, rows)
    small = min(n, size) if config.optim.average_curvature == 0 else n
    return itemsize * n * size * (1 + 2 / method.PARTS) + 8 * 4 * small**2


def check(task: Task, n: int) -> str:
    """Look before the run whether a step on n coordinates can be made; what it needs, in a line. A batch is bound.

    Raises InputError for an engine or a loss without responses, and for more memory than is allowed or than there is.
    """
    engine, config = task.engine, task.config
    if not hasattr(type(engine), "responses") or not hasattr(type(engine), "curvature") or task.shared:
        raise InputError(
            f'optim.name = "gauss-newton": {type(engine).__name__} gives no outputs, only losses; use "sgd" or "adam"'
        )
    rows, itemsize = engine.curvature.size, torch.empty(0, dtype=engine.index.dtype).element_size()
    size, asked = sketched(config, n, rows), needed(config, n, rows, itemsize) / 2**20
    what = f"|S| = {n:,} by {rows:,} outputs" + (f", compressed to {size:,}" if size < rows else "")
    there = _free_mib()
    limit = 2 * config.optim.memory_mb  # the Jacobian is within it; the small system may take as much again
    if asked > min(limit, there):
        of = f"optim.memory_mb = {config.optim.memory_mb:g}" if asked > limit else f"this machine has {there:,.0f} MiB free"
        raise InputError(
            f'optim.name = "gauss-newton": {what} needs {asked:,.0f} MiB, {of}; raise sparsity.ratio, lower optim.sketch, or '
            "use another optimiser"
        )
    return f"gauss-newton: {what}, {asked:,.0f} MiB over all ranks"


def _free_mib() -> float:
    """Memory that this node can give; where nothing says so, all that it has."""
    info = Path("/proc/meminfo")
    if info.exists() and (found := re.search(r"MemAvailable:\s*(\d+) kB", info.read_text())):
        return int(found[1]) / 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20


@dataclass
class Forecast:
    """What a step costs beside its queries: the parts of H, which ranks share, and the rest, measured here; bytes to be sent."""

    text: str
    shared_s: float
    root_s: float
    sent: float

    def seconds(self, ranks: int) -> float:
        """Of a step on so many ranks."""
        return self.shared_s / min(ranks, method.PARTS) + self.root_s + (self.sent / NETWORK if ranks > 1 else 0)


def forecast(task: Task, n: int) -> Forecast:
    """Times one part of H and one solution on random numbers. A batch is bound."""
    config, rows, dtype = task.config, task.engine.curvature.size, task.engine.index.dtype
    size = sketched(config, n, rows)
    small = size < n and config.optim.average_curvature == 0
    width, side = (size, size) if small else (-(-size // method.PARTS), n)
    block = torch.randn(n, width, dtype=dtype)
    shared, product = _seconds(lambda: method.gram(block.T if small else block))
    one = torch.ones(side, dtype=torch.float64)
    root, _ = _seconds(lambda: method.System(one, product.diagonal().clone(), "relative", product).solve(0.1))
    if small:
        shared, root = 0.0, root + shared
    shared, sent = shared * method.PARTS, torch.empty(0, dtype=dtype).element_size() * n * size
    text = f"gauss-newton: |S| = {n:,} by {size:,} numbers of {rows:,} outputs; H {shared:.2f} s over all ranks, "
    text += f"solution {root:.2f} s, {sent / 2**20:,.1f} MiB sent (counted at {NETWORK / 1e9:g} GB/s)"
    return Forecast(text, shared, root, sent)


def _seconds(work):
    work()
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found
