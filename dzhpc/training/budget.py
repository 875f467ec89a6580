"""What a run asks, may ask, and when that ends it."""

import math

from dzhpc.job.stopping import Reason
from dzhpc.method.estimators import Estimator
from dzhpc.method.gauss_newton import TRIES
from dzhpc.tasks import Task
from dzhpc.training.active_set import Pattern


class Budget:
    """Counts queries and steps against ``[stop]`` and ``task.max_queries``. All of it is the same on every rank.

    ``queries``: asked so far, in all launches.
    """

    def __init__(self, task: Task, estimator: Estimator, pattern: Pattern):
        self._task, self._estimator, self._pattern, self._stop = task, estimator, pattern, task.config.stop
        self.queries = 0

    @property
    def all_steps(self) -> int:
        """The steps of ``stop.epochs``, the schedule's length."""
        return max(1, round(self._stop.epochs * self._task.steps_per_epoch))

    @property
    def last_step(self) -> int:
        """The step at which the run ends, if nothing ends it before."""
        return min(self.all_steps, self._stop.steps or self.all_steps)

    def steps_left(self, step: int, n: int) -> int:
        """Steps on n coordinates that the run has still to make after a step."""
        limits = [limit for limit in (self._stop.queries, self._task.config.task.max_queries) if limit]
        return min([self.last_step - step, *(max(0, -(-(limit - self.queries) // self.of_step(n))) for limit in limits)])

    def foreseen(self, each: float, before: int) -> tuple[int, str]:
        """(the step at which a run ends that asks ``each`` a step and ``before`` the first, the key that ends it early or "")."""
        stop, most = self._stop, self._task.config.task.max_queries
        ends = [(self.last_step, "stop.steps" if self.last_step < self.all_steps else "")]
        if stop.queries:
            ends.append((max(1, math.ceil((stop.queries - before) / each)), "stop.queries"))
        if most:
            room = most - before - self._task.cost.evaluation - self.of_trials
            ends.append((max(0, math.floor(room / each)), "task.max_queries"))
        return min(ends, key=lambda end: end[0])

    def of_step(self, n: int) -> int:
        """Queries of a step on n coordinates, its base included."""
        return self._task.cost.bind + self._estimator.perturbations(n) * self._task.cost.query

    @property
    def of_trials(self) -> int:
        """Queries of a step at most, on top, for the losses of trial steps."""
        return TRIES * self._task.cost.query if self._task.config.optim.tries else 0

    def affords(self, queries: int) -> bool:
        """Whether ``task.max_queries`` leaves room for so many."""
        limit = self._task.config.task.max_queries
        return limit is None or self.queries + queries <= limit

    def affords_step(self, step: int, begun: bool) -> bool:
        """Whether it leaves room for a step, its scores unless it has begun, and an evaluation after it."""
        scores, n = (0, len(self._pattern.coords)) if begun else self._pattern.ahead(step)
        return self.affords(scores + self.of_step(n) + self.of_trials + self._task.cost.evaluation)

    def reason(self, step: int, begun: bool, accuracy: float) -> Reason:
        """The limit that is reached before a step, NONE if there is none. accuracy: of the last evaluation, NaN without one."""
        stop = self._stop
        if step >= self.all_steps:
            return Reason.EPOCHS
        if stop.steps and step >= stop.steps:
            return Reason.STEPS
        if stop.queries and self.queries >= stop.queries:
            return Reason.QUERIES
        if not self.affords_step(step, begun):
            return Reason.MAX_QUERIES
        if stop.target_accuracy and accuracy >= stop.target_accuracy:
            return Reason.ACCURACY
        return Reason.NONE
