"""The record of a run: a row a step and an evaluation in ``metrics.h5``, and the line that a person watches."""

import logging
import math
import time
import tomllib
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from dzhpc.files.checkpoint import State
from dzhpc.files.metrics import Metrics
from dzhpc.job.log import Line, duration

log = logging.getLogger("dzhpc")
LATE = 50  # steps whose mean is the pace of a run
FIRST = 2  # steps of a launch that do not tell its pace: nobody has measured yet who should evaluate what


@dataclass
class Step:
    """What is known of a step once it is made."""

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    queries: int  # of the run so far
    asked: int  # in this step
    step_s: float  # seconds, all included
    comm_s: float  # of these in collectives, but for waiting for compilers; and for Gauss-Newton's system
    compile_s: float  # of these until the last rank had compiled
    scores_s: float  # of these for the scores of weights
    peak_bytes: int


class Record:
    """Rows are kept in memory and written by :meth:`flush`; the root alone has them.

    ``evaluated_step`` and ``accuracy`` are those of the last evaluation that counts (-1, NaN without one); ``on_record`` is
    whether an earlier launch ended at its step with an evaluation. run: its ``run_uuid``.
    """

    def __init__(self, path: Path, run: str):
        self._metrics = Metrics(path, run)
        self.evaluated_step, self.accuracy, self.on_record = -1, math.nan, False

    def restore(self, found: State, steps_per_epoch: int, every_epochs: int) -> None:
        """Go on after a checkpoint: later rows are dropped, and evaluations that were never due, now or in an earlier launch."""
        step, written = found.step, map(tomllib.loads, [*found.history, found.config])
        due = {every_epochs, *(table.get("eval", {}).get("every_epochs", every_epochs) for table in written)}
        self._metrics.run = found.run_uuid
        regular = lambda row: row > 0 and any(row % (epochs * steps_per_epoch) == 0 for epochs in due)  # noqa: E731
        self.on_record = self._metrics.restore(step, regular)
        if len(self._metrics.eval) and self._metrics.eval[-1, 0] == step:
            self.evaluated_step, self.accuracy = step, float(self._metrics.eval[-1, 3])

    def add_step(self, s: Step) -> None:
        """A row of the table ``train``."""
        self._metrics.add_train(s.step, s.epoch, s.loss, s.lr, s.grad_norm, s.queries, s.step_s, s.comm_s, s.peak_bytes)

    def add_evaluation(self, step: int, epoch: float, loss: float, accuracy: float) -> None:
        """A row of the table ``eval``."""
        self.evaluated_step, self.accuracy = step, accuracy
        self._metrics.add_eval(step, epoch, loss, accuracy)

    def flush(self) -> None:
        """Write all rows so far. Raises CheckpointError."""
        self._metrics.flush()


class Progress:
    """``step 1200/9750 epoch 6.2 loss 1.834 |ghat| 0.41 lr 0.098 31,000 queries/s comm 2% ETA 1:27:10``.

    The first line ends in how long it took to get there: ``(set-up 3.1 s, compilation 42.0 s)``. Neither counts in the forecast
    of the end: the steps that are left at the pace of late ones, with what came between steps so far (evaluations, checkpoints),
    and the scores that are left, each as long as the last.
    """

    def __init__(self, last: int, quiet: bool, set_up_s: float, compile_s: float = 0.0):
        self._last, self.line, self._set_up_s = last, Line(quiet), set_up_s
        self._compile_s, self._scores_s, self._between_s, self._said = compile_s, 0.0, 0.0, False
        self._steps, self._since = 0, time.monotonic()
        self._late: deque[tuple[float, float, float, int]] = deque(maxlen=LATE)  # a step's seconds, less scores, comm, queries

    def show(self, s: Step, steps_left: int, scorings_left: int) -> None:
        """Take note of a step and print when it is time; ``..._left``: what the run has still to do."""
        now = time.monotonic()
        self._between_s += max(now - self._since - s.step_s, 0.0)
        self._since, self._compile_s = now, self._compile_s + s.compile_s
        self._steps, self._scores_s = self._steps + 1, s.scores_s or self._scores_s
        work = s.step_s - s.compile_s
        self._late.append((work, work - s.scores_s, s.comm_s, s.asked))
        self.line.say(lambda: self._text(s, self.seconds_left(steps_left, scorings_left)))

    def seconds_left(self, steps: int, scorings: int) -> float:
        """Forecast of what so many steps and scorings will take."""
        known = list(self._late)[min(max(0, FIRST + len(self._late) - self._steps), len(self._late) - 1) :]
        pace = sum(pure for _, pure, *_ in known) / len(known)
        return steps * (pace + self._between_s / self._steps) + scorings * self._scores_s

    def _text(self, s: Step, left: float) -> str:
        work, _, comm, asked = (sum(column) for column in zip(*self._late, strict=True))
        work = max(work, 1e-9)
        first = "" if self._said else f" (set-up {self._set_up_s:.1f} s, compilation {self._compile_s:.1f} s)"
        self._said = True
        return (
            f"step {s.step}/{self._last} epoch {s.epoch:.1f} loss {s.loss:.4g} |ghat| {s.grad_norm:.3g} lr {s.lr:.3g} "
            f"{asked / work:,.0f} queries/s comm {100 * comm / work:.0f}% ETA {duration(left)}{first}"
        )

    def close(self) -> None:
        """Leave the terminal clean."""
        self.line.close()
