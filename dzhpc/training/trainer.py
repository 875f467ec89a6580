"""The SPMD training loop: draw, bind, estimate, join, update; evaluate, record, checkpoint; stop for a named reason."""

import logging
import math
import time
import uuid

import numpy as np
import torch

from dzhpc import config as configuration
from dzhpc.errors import BlackBoxError, CheckpointError, NumericalError, ReplicaError
from dzhpc.files import store
from dzhpc.files.runfolder import RunFolder
from dzhpc.job import device as devices
from dzhpc.job.log import Progress, duration
from dzhpc.job.stopping import Reason, Requests
from dzhpc.job.world import World
from dzhpc.method import estimators, optimizers
from dzhpc.method.estimators import Partial
from dzhpc.method.first_order import PARTS
from dzhpc.method.seeds import derive
from dzhpc.models import zoo as models
from dzhpc.tasks import Task
from dzhpc.training.active_set import Pattern
from dzhpc.training.distribution import Distribution, Interrupted

log = logging.getLogger("dzhpc")
REBALANCE = 50  # steps between two looks at who should evaluate what, beside every new S


def check_restart(state: store.State, source: str, task: Task) -> None:
    """Raise CheckpointError unless a checkpoint belongs to this task: same frozen keys, same model."""
    for key, old, new in configuration.frozen_changes(models.config_of(state, source), task.config):
        raise CheckpointError(f"{source} was written with {key} = {old!r}, now {new!r}: frozen keys cannot change on restart")
    if state.model_sha256 != store.model_sha256(task.model):
        raise CheckpointError(f"{source} is of another model than model.name = {task.config.model.name!r} builds now")


class Trainer:
    """Trains a task on all ranks. Its state after a step is a function of the input file alone, not of ranks or restarts."""

    def __init__(self, world: World, task: Task, folder: RunFolder, quiet: bool = False):
        self.world, self.task, self.folder, self.config = world, task, folder, task.config
        self._quiet = quiet
        index = task.engine.index
        self._parameters = dict(zip(index.names, index.parameters, strict=True))
        self._optimizer = optimizers.make_optimizer(self.config.optim, self._parameters)
        self._requests = Requests(self.config, folder.path if world.is_root else None)
        self._distribution = Distribution(world, task.engine, self._requests.urgent)
        self._pattern = Pattern(task, self._distribution.split, self._distribution.attempt)
        self._partial: Partial | None = None  # of the next step
        self._metrics = store.Metrics(folder.metrics)
        self._history: list[str] = []
        self.run_uuid = str(uuid.uuid4())
        self.progressed = False  # whether this launch has evaluated anything that is kept
        self.step, self._queries, self._wall_before, self._start = 0, 0, 0.0, time.monotonic()
        self._saved_step, self._saved_at = -1, time.monotonic()
        self._evaluated_step, self._accuracy = -1, math.nan
        self._on_record = False  # whether an earlier launch ended here with an evaluation

    @property
    def seconds(self) -> float:
        """Since this launch began."""
        return time.monotonic() - self._start

    @property
    def last_step(self) -> int:
        """The step at which the run ends, if nothing ends it before."""
        return min(self._all_steps, self.config.stop.steps or self._all_steps)

    @property
    def _all_steps(self) -> int:
        return max(1, round(self.config.stop.epochs * self.task.steps_per_epoch))

    @property
    def _evaluation_interval(self) -> int:
        return self.config.eval.every_epochs * self.task.steps_per_epoch

    def restore(self, state: store.State) -> None:
        """Continue from a checkpoint that :func:`check_restart` has let pass."""
        models.assign(self.task.model, state.params, state.buffers)
        optimizers.restore(self._optimizer, self._parameters, state.optimizer)
        self._pattern.restore(state.lpr, state.coordinates)
        self._partial = state.partial
        self._history = state.history + ([state.config] if state.config != self.config.to_toml() else [])
        self.run_uuid, self.step, self._queries, self._wall_before = state.run_uuid, state.step, state.queries, state.wall_time_s
        self._saved_step = self.step
        if self.world.is_root:
            for key, value in self._environment().items():
                if state.env.get(key, value) != value:
                    log.warning("%s was %s, now %s: bits may differ from an undisturbed run", key, state.env[key], value)
            self._on_record = self._metrics.restore(self.step, lambda step: step > 0 and step % self._evaluation_interval == 0)
            if len(self._metrics.eval) and self._metrics.eval[-1, 0] == self.step:
                self._accuracy, self._evaluated_step = float(self._metrics.eval[-1, 3]), self.step

    def run(self) -> Reason:
        """Train until something ends the run; the final state is written before this returns. Collective."""
        self._check_replicas()
        record = self.world.bcast((self._evaluated_step, self._accuracy, self._on_record))  # the root read them
        self._evaluated_step, self._accuracy, self._on_record = record
        self._schedule = optimizers.make_schedule(
            self._optimizer, self.config.optim, self.config.stop.epochs, self.task.steps_per_epoch, self.step
        )
        if self.step and self.step % self._evaluation_interval == 0 and self._evaluated_step != self.step:
            self._evaluate(again=True)  # the black box failed in it, or its record is lost
            if self.world.is_root:
                self._metrics.flush()
        progress = Progress(self.last_step, self._quiet or not self.world.is_root)
        self._first_step = self.step
        try:
            while not (reason := self._reason_to_stop()):
                try:
                    self._train_step(progress)
                except Interrupted as interruption:  # on all ranks; the reason follows at once
                    self._keep(interruption.partial)
                    if interruption.failure:
                        self._give_up(interruption.failure)
        finally:
            progress.close()
        self._finish(reason)
        return reason

    def _reason_to_stop(self) -> Reason:
        stop, reason = self.config.stop, self._requests.reason()
        if self.step >= self._all_steps:
            reason = Reason.EPOCHS
        elif stop.steps and self.step >= stop.steps:
            reason = Reason.STEPS
        elif stop.queries and self._queries >= stop.queries:
            reason = Reason.QUERIES
        elif not self._affords_step():
            reason = Reason.MAX_QUERIES
        elif stop.target_accuracy and self._accuracy >= stop.target_accuracy:
            reason = Reason.ACCURACY
        return Reason(self.world.maximum(int(reason)))

    def _affords(self, queries: int) -> bool:
        limit = self.config.task.max_queries
        return limit is None or self._queries + queries <= limit

    def _affords_step(self) -> bool:
        """Whether ``task.max_queries`` leaves room for the next step, its scores, and an evaluation after it."""
        scores, n = self._pattern.ahead(self.step) if self._partial is None else (0, len(self._pattern.coords))
        return self._affords(scores + self._step_queries(n) + self.task.evaluation_queries)

    def _step_queries(self, n: int) -> int:
        return estimators.step_queries(self.config.zo, n, self.task.bind_cost, self.task.query_cost)

    def _train_step(self, progress: Progress) -> None:
        start, comm_before, queries_before = time.perf_counter(), self.world.comm_s, self._queries
        self._buffers_before = [b.clone() for b in self.task.model.buffers()]
        self._seed()
        self._draw()
        self._seed()  # scores draw random numbers, too, and are not made again when a step is completed
        if self.task.parts:
            loss, estimate = self._shared_gradient()
        else:
            loss = self._bind()
            estimate = self._estimate()
        self._check_finite(loss, estimate)
        self._check_changes(estimate)
        self._partial, self._queries = None, self._queries + self._step_queries(len(estimate))
        lr = self._optimizer.param_groups[0]["lr"]
        self._update(estimate)
        self.step, self.progressed = self.step + 1, True
        devices.synchronize(self.task.engine.index.device)
        grad_norm = float(torch.linalg.vector_norm(estimate.double()))
        epoch = self.step / self.task.steps_per_epoch
        step_s, comm_s = time.perf_counter() - start, self.world.comm_s - comm_before
        peak = devices.peak_bytes(self.task.engine.index.device, self.task.engine.peak_bytes)
        self._metrics.add_train(self.step, epoch, loss, lr, grad_norm, self._queries, step_s, comm_s, peak)
        progress.show(self.step, epoch, loss, grad_norm, lr, self._queries - queries_before, step_s, comm_s)
        if self.step % self.config.run.check_every == 0:
            self._check_replicas()
        if self.step % self._evaluation_interval == 0:
            self._evaluate()
        if self._checkpoint_due():
            self._save()

    def _bind(self) -> float:
        """The loss at theta; NaN where this rank's black box failed, which all ranks learn when they join the estimate."""
        if self.config.zo.estimator == "autograd":  # joins nothing
            return self.task.bind(self.step)
        return self._distribution.attempt(lambda: self.task.bind(self.step))

    def _seed(self) -> None:
        torch.manual_seed(derive(self.config.run.seed, "model", self.step))

    def _draw(self) -> None:
        """A new S where one is due; new slices for a new S, once the first step was measured, and now and then."""
        reassign = self.step - self._first_step < 2 or self.step % REBALANCE == 0
        if self._pattern.due(self.step) and self._partial is None:
            try:
                self._pattern.redraw(self.step)
            except Interrupted as interruption:  # what is known of the scores is no part of the step's estimate
                raise Interrupted(None, interruption.failure) from None
            self._queries, self._pattern.queries = self._queries + self._pattern.queries, 0
            reassign = True
        if reassign:
            self._distribution.assign(self._pattern.coords if self.world.is_root else None, self._coordinates_known())

    def _coordinates_known(self) -> Partial | None:
        return self._partial if self.config.zo.estimator == "cge" else None

    @property
    def _directions(self) -> int:
        return self.config.zo.q or len(self._distribution.coords)

    def _estimate(self) -> torch.Tensor:
        """The gradient estimate on S [n]. Raises Interrupted."""
        zo, engine = self.config.zo, self.task.engine
        if zo.estimator == "cge":
            return self._distribution.cge(zo.mu, zo.difference, self._partial)
        if zo.estimator == "rge":
            seed = derive(self.config.run.seed, "rge", self.step)
            return self._distribution.rge(self._directions, zo.mu, seed, zo.difference, self._partial)
        return self._on_coordinates(engine.index.flatten(estimators.autograd(engine).values()))

    def _shared_gradient(self) -> tuple[float, torch.Tensor]:
        """(loss, gradient on S [n]) by autograd from parts of the batch, dealt out to the ranks."""

        def rows_of(mine: range) -> np.ndarray:
            lost = np.full((len(mine), self.task.parts.width), np.nan)
            return self._distribution.attempt(lambda: self.task.gradient_rows(mine, self.step), lost)

        rows = self.world.split(PARTS, rows_of)
        if np.isnan(rows).any() and (failure := self._distribution.failure()):
            self._give_up(failure)
        loss, flat = self.task.parts.join(rows)
        return loss, self._on_coordinates(flat)

    def _on_coordinates(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[torch.from_numpy(self._distribution.coords).to(flat.device)]

    @torch.no_grad()
    def _keep(self, partial: Partial | None) -> None:
        """Go back to the state before the step, with what is known of it. Raises NumericalError rather than save a NaN."""
        for buffer, value in zip(self.task.model.buffers(), self._buffers_before, strict=True):
            buffer.copy_(value)
        if partial is None:
            return
        if not np.isfinite(partial.values[partial.done]).all():
            raise NumericalError(f"step {self.step + 1}: a difference is not finite; {self._advice()}")
        log.info("step %d left unfinished: %d of %d differences", self.step + 1, partial.done.sum(), len(partial.done))
        self._partial, self._saved_step, self.progressed = partial, -1, True

    def _give_up(self, failure: str) -> None:
        """Raise BlackBoxError on all ranks, with a checkpoint of what is known. Collective."""

        def keep() -> str:
            if self.step > self._saved_step and (self.step > 0 or self._partial is not None):
                self._save(last=True)
            files = self.folder.checkpoint_files()
            return f"the same command continues from {files[0]}" if files else "the same command starts afresh"

        raise BlackBoxError(f"{failure}; {self.world.on_root(keep)}")

    def _check_finite(self, loss: float, estimate: torch.Tensor) -> None:
        """Raise NumericalError on every rank: a NaN in one slice reaches all of them through the sum."""
        bad = (~torch.isfinite(estimate)).nonzero().flatten().tolist()
        if not bad and math.isfinite(loss):
            return
        step = self.step + 1
        if not math.isfinite(loss):
            raise NumericalError(
                f"step {step}: the loss at theta is {loss} on every rank, before any coordinate was perturbed; {self._advice()}"
            )
        coord = self.task.engine.index.describe(int(self._distribution.coords[bad[0]]))
        estimator = self.config.zo.estimator
        if estimator == "cge":
            rank, what = self._distribution.owner_of(bad[0]), f"the difference at {coord}"
        elif estimator == "rge" and (direction := self._distribution.bad_direction) is not None:
            rank = self._distribution.owner_of_direction(direction, self._directions)
            what = f"the difference along direction {direction}"
        else:
            rank, what = 0, f"the gradient at {coord}"
        raise NumericalError(
            f"step {step}, rank {rank}: {what} is not finite ({len(bad)} of {len(estimate)} coordinates); {self._advice()}"
        )

    def _check_changes(self, estimate: torch.Tensor) -> None:
        """Raise NumericalError on every rank where no perturbation changed what the black box answered."""
        zo, key = self.config.zo, self.task.box_key
        if not key or zo.estimator == "autograd" or not len(estimate) or estimate.any():
            return
        n = estimators.step_queries(zo, len(estimate), bind_cost=0)
        raise NumericalError(
            f"step {self.step + 1}: {key} answered the same under all {n} perturbations: quantised answers? "
            f"raise zo.mu (now {zo.mu:g})"
        )

    def _advice(self) -> str:
        files = self.folder.checkpoint_files()
        return f"lower optim.lr or zo.mu; the last good checkpoint is {files[0]}" if files else "lower optim.lr or zo.mu"

    @torch.no_grad()
    def _update(self, estimate: torch.Tensor) -> None:
        """theta = optimizer(theta, ghat): the same arithmetic on the same numbers on every rank."""
        index = self.task.engine.index
        flat = torch.zeros(index.size, dtype=index.dtype, device=index.device)
        flat[torch.from_numpy(self._distribution.coords).to(index.device)] = estimate
        for name, gradient in index.split(flat).items():
            self._parameters[name].grad = gradient
        self._optimizer.step()
        self._schedule.step()

    def _evaluate(self, again: bool = False) -> None:
        """Loss and accuracy on the test set; the parts are shared, and summed in one order whatever the rank count.

        again: the state counts its queries already.
        """

        def evaluate(mine: range) -> np.ndarray:
            lost = np.full((len(mine), 3), np.nan)
            return self._distribution.attempt(lambda: self.task.evaluate(mine, self.step), lost)

        self._queries += 0 if again else self.task.evaluation_queries
        rows = self.world.split(self.task.evaluation_parts, evaluate)
        loss, correct, count = (sum(column) for column in rows.T.tolist())
        if math.isnan(count):
            self._give_up(self._distribution.failure())
        self._accuracy, self._evaluated_step = correct / count, self.step
        epoch = self.step / self.task.steps_per_epoch
        self._metrics.add_eval(self.step, epoch, loss / count, self._accuracy)
        text = "" if math.isnan(self._accuracy) else f" accuracy {100 * self._accuracy:.2f} %"
        if self.task.steps_per_epoch > 1:
            log.info("evaluation step %d epoch %.1f loss %.4f%s", self.step, epoch, loss / count, text)

    def _checkpoint_due(self) -> bool:
        """Only the root writes, and all ranks hold the same state, so the root's clock may decide alone."""
        section = self.config.checkpoint
        by_steps = section.every_steps is not None and self.step % section.every_steps == 0
        return by_steps or time.monotonic() - self._saved_at > 60 * section.every_minutes

    def _save(self, last: bool = False) -> None:
        """Write metrics and checkpoint. Raises CheckpointError if they cannot be written, unless the run may go on without."""
        self._saved_at = time.monotonic()
        if not self.world.is_root:
            return
        try:
            self._metrics.flush()  # first, so that no checkpoint is ahead of its metrics
            self.folder.save(self._state(), self.config.checkpoint.keep)
        except CheckpointError as error:
            if last or self.config.checkpoint.on_full == "stop":
                raise
            log.warning("%s; going on without this checkpoint", error)
        else:
            self._saved_step = self.step
            self.folder.update_manifest(step=self.step, seconds=self.seconds)

    def _state(self) -> store.State:
        model = self.task.model
        return store.State(
            config=self.config.to_toml(),
            history=self._history,
            step=self.step,
            epoch=self.step / self.task.steps_per_epoch,
            queries=self._queries,
            wall_time_s=self._wall_before + self.seconds,
            run_uuid=self.run_uuid,
            model_sha256=store.model_sha256(model),
            seed=self.config.run.seed,
            params=dict(model.named_parameters()),
            buffers=dict(model.named_buffers()),
            optimizer=optimizers.slots(self._optimizer, self._parameters),
            coordinates=self._pattern.coords,
            lpr=self._pattern.lpr,
            env=self._environment(),
            partial=self._partial,
        )

    def _environment(self) -> dict[str, str]:
        """What bits may depend on beside the input."""
        return {
            "run.threads": str(self.config.run.threads),
            "device": self.task.engine.index.device.type,
            "torch": str(torch.__version__),
            "compiled": self.task.engine.environment["compiled"],
        }

    def _check_replicas(self) -> None:
        """Raise ReplicaError unless parameters, buffers and optimiser state agree on all ranks, bit for bit."""
        tensors = {**dict(self.task.model.named_parameters()), **dict(self.task.model.named_buffers())}
        for slot, values in optimizers.slots(self._optimizer, self._parameters).items():
            tensors.update({f"{slot}/{name}": value for name, value in values.items()})
        hashes = self.world.allgather(store.tensors_sha256(tensors, content=True))
        different = [rank for rank, value in enumerate(hashes) if value != hashes[0]]
        if different:
            raise ReplicaError(
                f"step {self.step}: the state of rank {', '.join(map(str, different))} differs from rank 0's; "
                f"look for differing hardware, libraries or run.threads, and restart from the last checkpoint"
            )

    def _finish(self, reason: Reason) -> None:
        """Final state first; then, unless time is short, a final evaluation."""
        evaluates = reason.exit_code == 0 and self._evaluated_step != self.step and self._affords(self.task.evaluation_queries)
        done = self._on_record or not evaluates
        if self.step == self._first_step and self.step > 0 and reason < Reason.STOP_FILE and done:
            log.info("nothing left to do: %s at step %d", reason.text, self.step)
            return
        if self.step > self._saved_step and (self.step > 0 or self._partial is not None):
            self._save(last=True)
        if evaluates:
            self._evaluate()
        if self.world.is_root:
            self._metrics.flush()
        queries, spent = f"{self._queries:,}", duration(self.seconds)
        log.info("stopped at step %d: %s; %s queries, %s", self.step, reason.text, queries, spent)
