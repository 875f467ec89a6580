"""The SPMD training loop: draw, bind, estimate, join, update; evaluate, record, checkpoint; stop for a named reason."""

import logging
import math
import time

import numpy as np
import torch

from dzhpc.config.paths import shown
from dzhpc.engines.pinned import seed
from dzhpc.errors import BlackBoxError, CheckpointError, NumericalError
from dzhpc.files.checkpoint import State
from dzhpc.files.runfolder import RunFolder
from dzhpc.job import device as devices
from dzhpc.job import process
from dzhpc.job.log import duration
from dzhpc.job.stopping import Reason, Requests
from dzhpc.job.world import World
from dzhpc.method.estimators import Partial, make_estimator
from dzhpc.method.first_order import SharedGradient
from dzhpc.method.optimizers import GaussNewton
from dzhpc.method.seeds import derive
from dzhpc.tasks import Task
from dzhpc.training import checks
from dzhpc.training.active_set import Pattern
from dzhpc.training.budget import Budget
from dzhpc.training.distribution import Distribution, Interrupted
from dzhpc.training.first_look import look
from dzhpc.training.gauss_newton import Newton
from dzhpc.training.record import Progress, Record, Step
from dzhpc.training.state import TrainingState

log = logging.getLogger("dzhpc")
REBALANCE = 50  # steps between two looks at who should evaluate what, beside every new S


class Trainer:
    """Trains a task on all ranks. Its state after a step is a function of the input file alone, not of ranks or restarts."""

    def __init__(self, world: World, task: Task, folder: RunFolder, quiet: bool = False):
        self.world, self.task, self.folder, self.config = world, task, folder, task.config
        self._quiet, self._index = quiet, task.engine.index
        self._estimator = make_estimator(self.config.zo, self.config.run.seed)
        self._requests = Requests(self.config, folder.path if world.is_root else None)
        self._distribution = Distribution(world, task, self._requests.urgent)
        self._pattern = Pattern(task, self._distribution.split, self._distribution.attempt, self._estimator.coordinates)
        self.budget = Budget(task, self._estimator, self._pattern)
        self._estimator.begin(task.engine)
        self.state = TrainingState(task, self._estimator, self._pattern, self.budget)
        optimizer, by_steps = self.state.optimizer, isinstance(self.state.optimizer, GaussNewton)
        self._newton = Newton(world, task, self._distribution, optimizer) if by_steps else None
        self._record = Record(folder.metrics, self.state.run_uuid)
        self._buffers_before: list[torch.Tensor] = []  # what the step under way began with
        self.compile_s = 0.0  # spent on compiling before the first step
        self.progressed = False  # whether this launch has evaluated anything that is kept
        self._saved_step, self._saved_at = -1, time.monotonic()

    @property
    def _evaluation_interval(self) -> int:
        return self.config.eval.every_epochs * self.task.steps_per_epoch

    def restore(self, found: State) -> None:
        """Continue from a checkpoint that :func:`dzhpc.training.checks.check_restart` has let pass."""
        self.state.restore(found)
        self._saved_step = found.step
        if self.world.is_root:
            for key, value in self.state.environment().items():
                if found.env.get(key, value) != value:
                    log.warning("%s was %s, now %s: bits may differ from an undisturbed run", key, found.env[key], value)
            self._record.restore(found, self.task.steps_per_epoch, self.config.eval.every_epochs)

    def run(self) -> Reason:
        """Train until something ends the run; the final state is written before this returns. Collective."""
        checks.follow_root(self.world, self.config, self.state.replicated())
        checks.check_replicas(self.world, self.state.step, self.state.replicated())
        record = self._record
        found = self.world.bcast((record.evaluated_step, record.accuracy, record.on_record))  # the root read them
        record.evaluated_step, record.accuracy, record.on_record = found
        schedule = self.state.schedule()
        if self.state.step and self.state.step % self._evaluation_interval == 0 and record.evaluated_step != self.state.step:
            self._evaluate(again=True)  # the black box failed in it, or its record is lost
            if self.world.is_root:
                record.flush()
        quiet = self._quiet or not self.world.is_root
        progress = Progress(self.budget.last_step, quiet, time.monotonic() - process.STARTED - self.compile_s, self.compile_s)
        try:
            while not (reason := self._reason_to_stop()):
                try:
                    self._train_step(schedule, progress)
                except Interrupted as interruption:  # on all ranks; the reason follows at once
                    self._keep(interruption.partial)
                    if interruption.failure:
                        self._give_up(interruption.failure)
        finally:
            progress.close()
        self._finish(reason)
        return reason

    def _reason_to_stop(self) -> Reason:
        asked = self._requests.reason()  # in any case: it takes the file STOP away
        limit = self.budget.reason(self.state.step, self.state.partial is not None, self._record.accuracy)
        return Reason(self.world.maximum(int(limit or asked)))

    def _train_step(self, schedule: torch.optim.lr_scheduler.LRScheduler, progress: Progress) -> None:
        state = self.state
        start, comm_before, compiled_before = time.perf_counter(), self.world.comm_s, self.task.engine.compile_s
        solved_before = self._newton.solve_s if self._newton else 0.0
        queries_before = self.budget.queries
        self._buffers_before = [b.clone() for b in self.task.model.buffers()]
        self._seed()
        new_slices = self._draw()
        scores_s = time.perf_counter() - start if self.budget.queries > queries_before else 0.0
        loss, estimate = self._gradient()
        step, n = state.step + 1, len(estimate)
        checks.check_finite(step, loss, estimate, self._estimator, self._distribution, self._advice)
        checks.check_changes(self.world, step, estimate, self._estimator, self.task, self._distribution.shards)
        if step == 1 and self.world.is_root:
            self._look(loss, estimate)
        update, trials = self._newton.step() if self._newton else (estimate, 0)
        asked = self.budget.of_step(n) + trials * self.task.cost.query
        state.partial, self.budget.queries = None, self.budget.queries + asked
        self._pattern.note(estimate, self._newton.diagonal if self._newton else None)
        lr = self._estimator.step_length or state.optimizer.param_groups[0]["lr"]
        state.update(self._distribution.coords, update)
        if self._estimator.step_length is None:
            schedule.step()
        self._estimator.advance(estimate)
        state.step, self.progressed = step, True
        devices.synchronize(self._index.device)
        own = self.task.engine.compile_s - compiled_before
        slowest = self.world.maximum(round(1e3 * own)) / 1e3 if new_slices else own  # only new slices bring new programs
        solved = self._newton.solve_s - solved_before if self._newton else 0.0
        made = Step(
            step, state.epoch, loss, lr, float(torch.linalg.vector_norm(estimate.double())), self.budget.queries,
            self.budget.queries - queries_before, time.perf_counter() - start,
            max(0.0, self.world.comm_s - comm_before - max(0.0, slowest - own)) + solved, slowest, scores_s,
            devices.peak_bytes(self._index.device, self.task.engine.base_bytes),
        )  # fmt: skip
        self._record.add_step(made)
        progress.show(made, self.budget.steps_left(step, n), self._pattern.scorings(step, self.budget.last_step))
        checks.follow_root(self.world, self.config, state.replicated())
        if state.step % self.config.run.check_every == 0:
            checks.check_replicas(self.world, state.step, state.replicated())
        if state.step % self._evaluation_interval == 0:
            self._evaluate()
        if self._checkpoint_due():
            self._save()

    def _look(self, loss: float, estimate: torch.Tensor) -> None:
        """Say what there is to say of the first estimate, where this rank has the whole batch bound."""
        distribution, estimator = self._distribution, self._estimator
        if not estimator.asks or self.task.shared or distribution.shards.count > 1:
            return
        if said := look(self.task.engine, estimator, distribution.coords, loss, estimate, self.config):
            log.info(said)

    def _seed(self) -> None:
        seed(derive(self.config.run.seed, "model", self.state.step))

    def _draw(self) -> bool:
        """A new S where one is due; new slices for a new S, once the first step was measured, and now and then: whether any."""
        reassign = self.state.step - self.state.first_step < 2 or self.state.step % REBALANCE == 0
        if self._pattern.due(self.state.step) and self.state.partial is None:
            try:
                self._pattern.redraw(self.state.step)
            except Interrupted as interruption:  # what is known of the scores is no part of the step's estimate
                raise Interrupted(None, interruption.failure) from None
            self.budget.queries, self._pattern.queries = self.budget.queries + self._pattern.queries, 0
            reassign = True
        if reassign:
            coords = self._pattern.coords if self.world.is_root else None
            self._distribution.assign(coords, self._estimator, self.state.partial)
        return reassign

    def _gradient(self) -> tuple[float, torch.Tensor]:
        """(loss at theta, the gradient estimate on S [n]). Raises Interrupted."""
        if self.task.shared:
            return self._shared_gradient(self.task.shared)
        source = self._newton or self._distribution
        return source.estimate(self._estimator, self.state.step, self.state.partial)

    def _shared_gradient(self, shared: SharedGradient) -> tuple[float, torch.Tensor]:
        """(loss, gradient on S [n]) by autograd from parts of the batch, dealt out to the ranks."""
        self._seed()  # scores may have drawn random numbers

        def rows_of(mine: range) -> np.ndarray:
            lost = np.full((len(mine), shared.width), np.nan)
            return self._distribution.attempt(lambda: shared.rows(mine, self.state.step), lost)

        rows = self.world.split(shared.parts, rows_of)
        if np.isnan(rows).any() and (failure := self._distribution.failure()):
            self._give_up(failure)
            raise Interrupted(None)
        loss, flat = shared.join(rows)
        return loss, flat[torch.from_numpy(self._distribution.coords).to(flat.device)]

    @torch.no_grad()
    def _keep(self, partial: Partial | None) -> None:
        """Go back to the state before the step, with what is known of it. Raises NumericalError rather than save a NaN."""
        for buffer, value in zip(self.task.model.buffers(), self._buffers_before, strict=True):
            buffer.copy_(value)
        if partial is None:
            return
        if not np.isfinite(partial.values[partial.done]).all():
            raise NumericalError(f"step {self.state.step + 1}: a difference is not finite; {self._advice()}")
        log.info("step %d left unfinished: %d of %d differences", self.state.step + 1, partial.done.sum(), len(partial.done))
        self.state.partial, self._saved_step, self.progressed = partial, -1, True

    def _give_up(self, failure: str) -> None:
        """Raise BlackBoxError on all ranks, with a checkpoint of what is known. Collective.

        Not so where a signal came meanwhile, which may have ended a program that the black box runs: then that is the reason.
        """
        if self.world.maximum(int(self._requests.reason())) >= Reason.SIGNAL:
            if self.world.is_root:
                log.warning("%s; that was after the run was asked to stop", failure)
            return

        def keep() -> str:
            if self._unsaved:
                self._save(last=True)
            files = self.folder.checkpoint_files()
            return f"the same command continues from {shown(files[0])}" if files else "the same command starts afresh"

        raise BlackBoxError(f"{failure}; {self.world.on_root(keep)}")

    def _advice(self, perturbed: bool = True) -> str:
        if self.state.step == 0:
            lower = "lower zo.mu, or " if perturbed else ""
            return f"nothing was trained yet: {lower}look at the loss, the data, and the starting weights"
        files = self.folder.checkpoint_files()
        return f"lower optim.lr or zo.mu; the last good checkpoint is {shown(files[0])}" if files else "lower optim.lr or zo.mu"

    def _evaluate(self, again: bool = False) -> None:
        """Loss and accuracy on the test set; the parts are shared, and summed in one order whatever the rank count.

        again: the state counts its queries already.
        """

        def evaluate(mine: range) -> np.ndarray:
            lost = np.full((len(mine), 3), np.nan)
            return self._distribution.attempt(lambda: self.task.evaluate(mine, self.state.step), lost)

        self.budget.queries += 0 if again else self.task.cost.evaluation
        rows = self.world.split(self.task.evaluation_parts, evaluate)
        loss, correct, count = (sum(column) for column in rows.T.tolist())
        if math.isnan(count):
            self._give_up(self._distribution.failure())
            return
        self._record.add_evaluation(self.state.step, self.state.epoch, loss / count, correct / count)
        text = "" if math.isnan(correct) else f" accuracy {100 * correct / count:.2f} %"
        if self.task.steps_per_epoch > 1:
            log.info("evaluation step %d epoch %.1f loss %.4f%s", self.state.step, self.state.epoch, loss / count, text)

    def _checkpoint_due(self) -> bool:
        """Only the root writes, and all ranks hold the same state, so the root's clock may decide alone."""
        section = self.config.checkpoint
        by_steps = section.every_steps is not None and self.state.step % section.every_steps == 0
        return by_steps or time.monotonic() - self._saved_at > 60 * section.every_minutes

    @property
    def _unsaved(self) -> bool:
        """Whether the newest checkpoint lacks something that would have to be made again."""
        return self.state.step > self._saved_step and (self.state.step > 0 or self.state.partial is not None)

    def _save(self, last: bool = False) -> None:
        """Write metrics and checkpoint. Raises CheckpointError if they cannot be written, unless the run may go on without."""
        self._saved_at = time.monotonic()
        if not self.world.is_root:
            return
        try:
            self._record.flush()  # first, so that no checkpoint is ahead of its metrics
            self.folder.save(self.state.checkpoint(), self.config.checkpoint.keep)
        except CheckpointError as error:
            if last or self.config.checkpoint.on_full == "stop":
                raise
            log.warning("%s; going on without this checkpoint", error)
        else:
            self._saved_step = self.state.step
            self.folder.update_manifest(step=self.state.step, seconds=self.state.seconds)

    def _finish(self, reason: Reason) -> None:
        """Final state first; then, unless time is short, a final evaluation."""
        missing = self._record.evaluated_step != self.state.step
        evaluates = reason.exit_code == 0 and missing and self.budget.affords(self.task.cost.evaluation)
        done = self._record.on_record or not evaluates
        if self.state.step == self.state.first_step and self.state.step > 0 and reason < Reason.STOP_FILE and done:
            log.info("nothing left to do: %s at step %d", reason.text, self.state.step)
            return
        if self._unsaved:
            self._save(last=True)
        if evaluates:
            self._evaluate()
        if self.world.is_root:
            self._record.flush()
        queries, spent = f"{self.budget.queries:,}", duration(self.state.seconds)
        log.info("stopped at step %d: %s; %s queries, %s", self.state.step, reason.text, queries, spent)
