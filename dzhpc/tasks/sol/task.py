"""Solver in the loop: a network corrects a coarse solver at every step, trained through n unrolled steps by queries."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from dzhpc.config import Config
from dzhpc.data import Order, shard
from dzhpc.errors import InputError, NumericalError
from dzhpc.method.first_order import SharedGradient
from dzhpc.method.seeds import generator
from dzhpc.tasks import fitting
from dzhpc.tasks.protocol import Cost, Task
from dzhpc.tasks.sol import reference
from dzhpc.tasks.sol.correction import Correction
from dzhpc.tasks.sol.loss import Diverged, Windows
from dzhpc.tasks.sol.reference import Reference, Trajectories
from dzhpc.tasks.sol.rollout import rollout
from dzhpc.tasks.sol.simulators import make_simulator, try_simulator
from dzhpc.tasks.sol.unrolled import Unrolled, UnrolledDelta

log = logging.getLogger("dzhpc")
LONGEST = 500  # steps of an evaluation
UNTRAINED = "nothing was trained yet: look at the simulator, the reference, and the starting weights"
T = TypeVar("T")


class SolTask(Task):
    """See :class:`dzhpc.tasks.Task`. Raises InputError where reference, simulator, network and input do not fit each other.

    A training example is a window: unroll + 1 successive frames of a training simulation. Queries are states that the simulator
    is asked to advance. An evaluation is the error (MAE) in rollouts over the ``valid`` simulations, see
    :mod:`dzhpc.tasks.sol.rollout`; a step that has diverged counts with the bound, so it never ends a run.
    """

    in_shards = summed = True

    def __init__(self, config: Config, device: torch.device, data_set: reference.Reference):
        self.config = config.model_copy(deep=True)
        task, zo, batch = config.task, config.zo, config.data.batch_size
        self.reference = data_set.to(device)
        self.data_bytes = sum(getattr(data_set, split).states.nbytes for split in reference.SPLITS)
        self._where = self.reference.where()
        self.simulator = make_simulator(task, self.reference, device, threads=config.run.threads)
        self._check_keys()
        self.model = fitting.build(self.config, device, **_sizes(self.reference))
        self.correction = fitting.lay_out(self.model, lambda layout: Correction(self.model, self.reference))
        self.windows = AllWindows(self.reference.train, config)
        if zo.estimator == "autograd":
            self.shared = SharedGradient(self.model, config.run.seed, self._shared_batch)
        if zo.engine == "full" or self.shared:  # there the engine only serves scores
            self.engine = Unrolled(self.correction, self.simulator, task.unroll)
        else:
            self.engine = UnrolledDelta(self.correction, self.simulator, task.unroll, batch // config.data.shards, zo.memory_mb)
        self.steps_per_epoch = self.windows.steps_per_epoch
        self.evaluation_parts, frames = self.reference.valid.states.shape[:2]
        self._steps = min(LONGEST, frames - 1)
        # no box is named: where the last layer is zero, perturbing the others changes nothing
        self.cost = Cost(batch * task.unroll, batch * (task.unroll - 1), self.evaluation_parts * self._steps)

    @property
    def lost(self) -> int:
        return self.engine.lost

    @classmethod
    def read(cls, config: Config) -> reference.Reference:
        return reference.find(config.data)

    def examples(self) -> dict[str, torch.Tensor]:
        parts = {split: getattr(self.reference, split) for split in reference.SPLITS}
        return {f"{split}/{name}": t for split, part in parts.items() for name, t in vars(part).items()}

    def bind(self, step: int, shard: int = 0) -> float:
        self.model.train()
        return self._advised(step, lambda: self.engine.bind(self._part(self.windows.batch(step), shard)))

    def _part(self, windows: Windows, number: int | None) -> Windows:
        return windows[shard(number, self.config.data.shards, len(windows.names))]

    @staticmethod
    def _advised(step: int, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except Diverged as error:
            cause = "lower optim.lr, and go back to an earlier checkpoint" if step else UNTRAINED
            raise NumericalError(f"{error}; {cause}") from None

    def bind_for_scores(self, number: int, shard: int | None = None) -> float:
        self.model.train()
        try:
            return self.engine.bind(self._part(self.windows.drawn(number), shard))
        except Diverged as error:
            raise NumericalError(
                f"{error} (pruning scores are taken at theta and, for ZO-GraSP, at theta + zo.mu * gradient, which may be far "
                'away: lower zo.mu, or use sparsity.scores = "random")'
            ) from None

    def _shared_batch(self, step: int) -> tuple[int, Callable[[slice], torch.Tensor]]:
        """What :class:`dzhpc.method.first_order.SharedGradient` asks for; losses of windows are summed, not averaged."""
        self.model.train()
        windows = self.windows.batch(step)
        count = len(windows.names)

        def loss(positions: slice) -> torch.Tensor:
            part = windows[positions]
            return self._advised(step, lambda: self.engine.loss(part)).sum() * (count / len(part.names))

        return count, loss

    def evaluate(self, parts: Sequence[int], step: int) -> np.ndarray:
        self.model.eval()
        rows, valid = np.zeros((len(parts), 3)), self.reference.valid
        for k, part in enumerate(parts):
            one = Trajectories(valid.states[part : part + 1], valid.parameters[part : part + 1])
            found = rollout(self.simulator, self.correction, one, self._where, self._steps)
            if at := int(found.diverged[0]):
                log.warning("evaluation at step %d: %s diverges at step %d of %d", step, _name(one, 0), at, self._steps)
            rows[k] = float(found.capped(self._steps)), np.nan, 1
        return rows

    def try_box(self) -> None:
        windows = self.windows.spread(8)
        try_simulator(self.simulator, self.config.task, windows.states[:, 0], windows.parameters)

    def _check_keys(self) -> None:
        """Raise InputError for keys that do not fit the reference or the simulator."""
        task, zo, sparsity = self.config.task, self.config.zo, self.config.sparsity
        factor = self.reference.about.get("factor", task.factor)
        if not task.is_own and factor != task.factor:
            raise InputError(
                f"task.factor = {task.factor}: the reference {self.config.data.name} was made with {factor}; set it to that"
            )
        if task.unroll > 1 and zo.estimator == "autograd" and not self.simulator.differentiable:
            raise InputError(
                f'zo.estimator = "autograd": no gradient goes through {task.box}; use "projected", task.unroll = 1, or cge'
            )
        if task.unroll > 1 and sparsity.scores == "fo-grasp" and sparsity.ratio > 0:
            raise InputError(
                'sparsity.scores = "fo-grasp": a simulator has no second derivative; use zo-grasp or random, or task.unroll = 1'
            )


class AllWindows:
    """The windows of the training trajectories, or ``data.train_limit`` of them, in batches that follow from (seed, step)."""

    def __init__(self, train: Trajectories, config: Config):
        self._train, self._unroll, self._seed = train, config.task.unroll, config.run.seed
        self._batch_size = config.data.batch_size
        simulations, frames = train.states.shape[:2]
        if frames <= self._unroll:
            raise InputError(f"task.unroll = {self._unroll}: the reference has {frames} frames; it needs {self._unroll + 1}")
        self._starts = frames - self._unroll  # of a simulation
        self._numbers = torch.arange(simulations * self._starts)
        limit = config.data.train_limit
        if limit is not None and limit < len(self._numbers):
            self._numbers = torch.randperm(len(self._numbers), generator=generator(self._seed, "train_limit"))[:limit]
        if self._batch_size > len(self._numbers):
            count = len(self._numbers)
            raise InputError(f"data.batch_size = {self._batch_size}: there are {count} windows; choose a smaller batch")
        self._order = Order(len(self._numbers), self._batch_size, self._seed, torch.device("cpu"))
        self.steps_per_epoch = self._order.steps_per_epoch

    def batch(self, step: int) -> Windows:
        """Those of a step."""
        return self._of(self._numbers[self._order.chosen(step)])

    def drawn(self, number: int) -> Windows:
        """The ``number``-th batch for pruning scores."""
        order = torch.randperm(len(self._numbers), generator=generator(self._seed, "score windows", number))
        return self._of(self._numbers[order[: self._batch_size]])

    def spread(self, count: int) -> Windows:
        """At most so many, evenly spaced."""
        count = min(count, len(self._numbers))
        return self._of(self._numbers[torch.arange(count) * len(self._numbers) // count])

    def _of(self, numbers: torch.Tensor) -> Windows:
        pairs = [divmod(number, self._starts) for number in numbers.tolist()]
        states = torch.stack([self._train.states[s, f : f + self._unroll + 1] for s, f in pairs])
        parameters = self._train.parameters[[s for s, _ in pairs]]
        return Windows(states, parameters, [f"{_name(self._train, s)}, frame {f}" for s, f in pairs])


def _name(trajectories: Trajectories, simulation: int) -> str:
    return f"simulation of parameter {float(trajectories.parameters[simulation]):g}"


def _sizes(found: Reference) -> dict[str, int]:
    """What a model's constructor may want to know of a state."""
    channels = found.shape[0] if len(found.shape) > 1 else 1
    return {"channels": channels, "dims": 2 if len(found.shape) == 3 else 1}
