"""The equal parts of a step's batch: bound one at a time, their losses and running statistics joined in one order."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from dzhpc.engines.pinned import seed
from dzhpc.errors import InputError
from dzhpc.method.seeds import derive
from dzhpc.tasks import Task


class Shards:
    """The n = ``data.shards`` parts of the batch of one step at a time, of which a rank binds those that it has work of.

    The loss of the step is the mean of its shards' losses (their sum, where a batch's loss is a sum over its examples), and so is
    a difference: d_j = sum_s w d_js, added in the order of the shards. BatchNorm normalises by the statistics of a shard; running
    statistics are moved by the shards in order. Each shard is bound at the buffers that the step began with, so that all it gives
    is a function of (theta, step, shard), whoever binds it.

    bound: the shard that the engine holds, None where it holds none of this step. rows [n, 1 + b] float64: loss and buffers of
    the shards that this rank has bound.
    """

    def __init__(self, task: Task):
        self._task, self.count = task, task.config.data.shards
        self.weight = 1.0 if task.summed else 1 / self.count
        self._buffers = list(task.model.buffers())
        self._width = 1 + sum(b.numel() for b in self._buffers)
        self._before: list[Tensor] = []  # the buffers that the step began with
        self._step, self._lost, self.bound = 0, 0, None
        self.rows = np.zeros((self.count, self._width))

    @property
    def lost(self) -> int:
        """As :attr:`dzhpc.tasks.Task.lost`, of all shards that this rank has bound in this step."""
        return self._lost + (self._task.lost if self.bound is not None else 0)

    def begin(self, step: int) -> None:
        """A step begins: nothing is bound, the buffers are those that it starts from."""
        self._step, self._lost, self.bound = step, 0, None
        self._before = [b.clone() for b in self._buffers]
        self.rows[:] = 0

    def use(self, shard: int) -> None:
        """Bind a shard, unless it is bound; raises what the task's ``bind`` raises."""
        if shard == self.bound:
            return
        self._lost, self.bound = self.lost, None
        self._seed(shard)
        loss = self._task.bind(self._step, shard) if self.count > 1 else self._task.bind(self._step)
        self.bound = shard
        flat = [b.detach().double().reshape(-1) for b in self._buffers]
        self.rows[shard] = np.concatenate([[loss], torch.cat(flat).cpu().numpy() if flat else []])
        if self.count > 1:
            self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the buffers back to what the step began with."""
        for buffer, value in zip(self._buffers, self._before, strict=True):
            buffer.copy_(value)

    def average(self, values: np.ndarray) -> np.ndarray:
        """The value of the step from those of its shards [n, ...], in their dtype: added in order, then weighted."""
        total = values[0].copy()
        for value in values[1:]:
            total += value
        return total * total.dtype.type(self.weight) if self.count > 1 else total

    def settle(self, rows: np.ndarray) -> float:
        """The step's loss from the rows of all shards; moves the buffers as the shards in order would. Raises InputError."""
        if self.count == 1:
            return float(rows[0, 0])
        momenta, place = self._momenta(), 1
        for k, (buffer, before) in enumerate(zip(self._buffers, self._before, strict=True)):
            found = rows[:, place : place + buffer.numel()].reshape(self.count, *buffer.shape)
            place += buffer.numel()
            start = before.double().cpu().numpy()
            if id(buffer) in momenta:
                self._move(k, _in_order(start, found, momenta[id(buffer)]))
            elif not buffer.is_floating_point():
                self._move(k, start + (found - start).sum(0))
            elif (found != start).any():
                raise InputError(f"data.shards = {self.count}: {self._name(k)} moves at each pass; only a BatchNorm's may")
        return float(self.average(rows[:, 0]))

    @torch.no_grad()
    def _move(self, k: int, value: np.ndarray) -> None:
        self._buffers[k].copy_(torch.from_numpy(np.asarray(value)))

    def _momenta(self) -> dict[int, list[float]]:
        """By how much each shard in order moves a running statistic; without a momentum it is the mean over all passes."""
        found = {}
        for module in self._task.model.modules():
            if isinstance(module, _NormBase) and module.running_mean is not None:
                factors = [module.momentum] * self.count
                if module.momentum is None:
                    done = self._before[self._number(module.num_batches_tracked)]
                    factors = [1 / (int(done) + 1 + s) for s in range(self.count)]
                found |= {id(module.running_mean): factors, id(module.running_var): factors}
        return found

    def _number(self, buffer: Tensor) -> int:
        return next(k for k, b in enumerate(self._buffers) if b is buffer)

    def _name(self, k: int) -> str:
        return f"buffer {[name for name, _ in self._task.model.named_buffers()][k]}"

    def _seed(self, shard: int) -> None:
        number = self._task.config.run.seed
        seed(derive(number, "model", self._step, shard) if self.count > 1 else derive(number, "model", self._step))


def _in_order(start: np.ndarray, found: np.ndarray, momenta: list[float]) -> np.ndarray:
    """r <- r + m (x_s - r) for all shards s in order; found: what each gives from ``start``, by the first momentum."""
    value = start
    for moved, momentum in zip(found, momenta, strict=True):
        if momentum:
            value = value + momentum * (start + (moved - start) / momenta[0] - value)
    return value
