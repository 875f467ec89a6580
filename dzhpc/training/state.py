"""All that a run is between two steps, declared in one place: what ranks replicate, and what a checkpoint holds."""

import functools
import time
import uuid

import numpy as np
import torch

from dzhpc.files.checkpoint import State
from dzhpc.job import processor
from dzhpc.method import optimizers
from dzhpc.method.estimators import Estimator, Partial
from dzhpc.models.identity import fingerprint, model_sha256
from dzhpc.models.weights import assign
from dzhpc.tasks import Task
from dzhpc.training.active_set import Pattern
from dzhpc.training.budget import Budget


class TrainingState:
    """A function of the input file alone, not of ranks or restarts, but for ``run_uuid`` and the wall time.

    step: steps done; ``first_step`` of them before this launch. partial: what is known of the next step, if it was left
    unfinished.
    """

    def __init__(self, task: Task, estimator: Estimator, pattern: Pattern, budget: Budget):
        self._task, self._estimator, self.pattern, self.budget = task, estimator, pattern, budget
        self.config, self.index = task.config, task.engine.index
        self.parameters = dict(zip(self.index.names, self.index.parameters, strict=True))
        self.optimizer = optimizers.make_optimizer(self.config.optim, self.parameters)
        self.step, self.first_step = 0, 0
        self.partial: Partial | None = None
        self.run_uuid = str(uuid.uuid4())
        self._history: list[str] = []  # the configs of earlier launches
        self._wall_before, self._start = 0.0, time.monotonic()

    @property
    def epoch(self) -> float:
        """Passes over the training set."""
        return self.step / self._task.steps_per_epoch

    @property
    def seconds(self) -> float:
        """Since this launch began."""
        return time.monotonic() - self._start

    @functools.cached_property
    def _examples(self) -> str:
        """What tells the data set from another, "" without one."""
        found = self._task.examples()
        return fingerprint(found) if found else ""

    def schedule(self) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rate from this step on."""
        optim, epochs = self.config.optim, self.config.stop.epochs
        return optimizers.make_schedule(self.optimizer, optim, epochs, self._task.steps_per_epoch, self.step)

    def restore(self, found: State) -> None:
        """Continue from a checkpoint that :func:`dzhpc.training.checks.check_restart` has let pass."""
        assign(self._task.model, found.params, found.buffers)
        optimizers.restore(self.optimizer, self.parameters, found.optimizer)
        self.pattern.restore(found.lpr, found.coordinates, found.sizes)
        self._estimator.restore(found.estimator)
        self.partial, self.budget.queries = found.partial, found.queries
        self._history = found.history + ([found.config] if found.config != self.config.to_toml() else [])
        self.run_uuid, self._wall_before = found.run_uuid, found.wall_time_s
        self.step = self.first_step = found.step

    @torch.no_grad()
    def update(self, coords: np.ndarray, estimate: torch.Tensor) -> None:
        """theta = optimizer(theta, ghat), ghat [n] on ``coords`` perhaps minus Gauss-Newton's step: the same on every rank."""
        if self._estimator.step_length is not None:  # a move: what it does not move keeps its bits
            for k in estimate.nonzero().flatten().tolist():
                self.index.element(int(coords[k]))[1].add_(estimate[k])
            return
        flat = torch.zeros(self.index.size, dtype=self.index.dtype, device=self.index.device)
        flat[torch.from_numpy(coords).to(self.index.device)] = estimate
        for name, gradient in self.index.split(flat).items():
            self.parameters[name].grad = gradient
        self.optimizer.step()

    def replicated(self) -> dict[str, torch.Tensor]:
        """Parameters, buffers and optimiser state, by name: equal on all ranks, bit for bit."""
        tensors = {**dict(self._task.model.named_parameters()), **dict(self._task.model.named_buffers())}
        for slot, values in optimizers.slots(self.optimizer, self.parameters).items():
            values = {name: value for name, value in values.items() if slot != "curvature" or name == "damping"}
            tensors.update({f"{slot}/{name}": value for name, value in values.items()})
        return tensors if self.pattern.sizes is None else tensors | {"sizes": self.pattern.sizes}

    def environment(self) -> dict[str, str]:
        """What bits may depend on beside the input."""
        return {
            "run.threads": str(self.config.run.threads),
            "device": self.index.device.type,
            "torch": str(torch.__version__),
            "instruction set": processor.instruction_set(),
            **({"data (SHA-256)": self._examples} if self._examples else {}),
            **self._task.engine.environment,
        }

    def checkpoint(self) -> State:
        """What a checkpoint holds."""
        model = self._task.model
        return State(
            config=self.config.to_toml(),
            history=self._history,
            step=self.step,
            epoch=self.epoch,
            queries=self.budget.queries,
            wall_time_s=self._wall_before + self.seconds,
            run_uuid=self.run_uuid,
            model_sha256=model_sha256(model),
            seed=self.config.run.seed,
            params=dict(model.named_parameters()),
            buffers=dict(model.named_buffers()),
            optimizer=optimizers.slots(self.optimizer, self.parameters),
            coordinates=self.pattern.coords,
            sizes=self.pattern.sizes,
            lpr=self.pattern.lpr,
            env=self.environment(),
            partial=self.partial,
            estimator=self._estimator.state(),
        )
