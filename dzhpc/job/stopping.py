"""Why a run ends, and the signals, files and clocks that may ask for it."""

import contextlib
import functools
import logging
import os
import signal
import threading
import time
from enum import IntEnum
from pathlib import Path

from dzhpc.config import Config, paths
from dzhpc.config.paths import shown
from dzhpc.errors import STOPPED_EARLY
from dzhpc.job import process

log = logging.getLogger("dzhpc")
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # who sends these does not want the job to come back
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, *ENDING)
LONG_STEP = 10.0  # seconds that a step may go on after it was asked to stop


class Reason(IntEnum):
    """Ordered by weight: where ranks disagree the largest counts."""

    NONE = 0
    EPOCHS = 1
    STEPS = 2
    QUERIES = 3
    MAX_QUERIES = 4
    ACCURACY = 5
    STOP_FILE = 6
    WALLTIME = 7
    DEADLINE = 8
    SIGNAL = 9
    TERMINATED = 10

    @property
    def exit_code(self) -> int:
        """75 where the same command should be submitted again, else 0."""
        return STOPPED_EARLY if self >= Reason.WALLTIME else 0

    @property
    def text(self) -> str:
        return {
            Reason.EPOCHS: "all epochs done", Reason.STEPS: "stop.steps reached", Reason.QUERIES: "stop.queries reached",
            Reason.MAX_QUERIES: "task.max_queries would be exceeded by the next step",
            Reason.ACCURACY: "stop.target_accuracy reached", Reason.STOP_FILE: "STOP file found",
            Reason.WALLTIME: "stop.walltime reached", Reason.DEADLINE: "the job's time limit is near",
            Reason.SIGNAL: "signal received", Reason.TERMINATED: "signal received (SIGTERM, SIGHUP or Ctrl-C)",
        }.get(self, "running")  # fmt: skip


received_signals: list[tuple[int, float]] = []  # received so far, and when (time.monotonic)
_heard: set[int] = set()  # signals that are ours to answer
_replaced: set[int] = set()  # those of them for which user code had a handler of its own

_masks = threading.local()  # of a thread that forks: which signals it had blocked before


def listen() -> None:
    """Take note of signals from now on: one that comes while libraries load must not kill the job."""
    _look_after_forks()
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _note)
            _heard.add(number)


def ignore_warnings() -> None:
    """At the end: Python takes its handlers back before the process ends, and a warning would then kill a job that is done."""
    for number in _heard.intersection((signal.SIGUSR1, signal.SIGUSR2)):
        signal.signal(number, signal.SIG_IGN)


def listen_again() -> None:
    """Put our handlers back in place of those that user code has set since, by which the run would end without a checkpoint.

    It is said once for each signal. Nothing is done outside the main thread, or where nobody listened.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _heard:
        other = signal.getsignal(number)
        if other is _note:
            continue
        signal.signal(number, _note)
        if number not in _replaced:
            _replaced.add(number)
            name = getattr(other, "__qualname__", getattr(other, "name", None)) or repr(other)
            text = "user code has set a handler (%s), which is replaced, since this signal stops the run with a checkpoint"
            log.warning(f"%s: {text}", signal.Signals(number).name, name)


@functools.cache
def _look_after_forks() -> None:
    os.register_at_fork(before=_hold, after_in_parent=_let_in, after_in_child=_be_nobody)


def _note(received: int, frame: object) -> None:
    if received == signal.SIGINT and any(number == received for number, _ in received_signals):
        raise KeyboardInterrupt  # who presses Ctrl-C twice does not want to wait
    received_signals.append((received, time.monotonic()))


def _hold() -> None:
    """A signal that reaches a child before it has its own handler would be lost: it waits until then."""
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def _let_in() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _be_nobody() -> None:
    """In a child that user code has forked: SIGTERM ends it, since that is how ``Process.terminate`` and ``Pool`` end theirs, and
    so does Ctrl-C.

    The warnings SIGUSR1 and SIGUSR2 still do nothing there: mpirun relays them to all processes of a rank.
    """
    for number, usual in zip(ENDING, (signal.SIG_DFL, signal.default_int_handler, signal.SIG_DFL), strict=True):
        if signal.getsignal(number) is _note:
            signal.signal(number, usual)
    _let_in()


def guard() -> None:
    """What comes before torch loads, which takes seconds: a rank may lose its launcher, or be warned, in that time."""
    process.die_with_launcher()
    listen()


def tell_job_script(word: str) -> None:
    """LISTENING, then why the run stopped: slurm/launch.sh forwards signals after the first, and may requeue after others."""
    if path := os.environ.get("DZHPC_STATUS"):
        with contextlib.suppress(OSError):
            (paths.started() / path).write_text(word)


class Requests:
    """What asks this rank to stop: a signal; on the root also the clock and the file STOP in the run folder (consumed).

    A reason once found stays. The step under way may end first, unless that takes longer than some seconds.
    """

    def __init__(self, config: Config, folder: Path | None):
        self._start, self._walltime = time.monotonic(), config.stop.walltime
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self._deadline = float(end) - config.run.deadline_margin if end.isdecimal() else None
        self._file, self._next_look = folder / "STOP" if folder else None, 0.0
        self._patience = min(LONG_STEP, config.run.deadline_margin / 2)
        self._found, self._since = Reason.NONE, 0.0

    def reason(self) -> Reason:
        """This rank's reason to stop after the step under way."""
        listen_again()
        found = self._look()
        if found and not self._found:
            self._since = received_signals[0][1] if received_signals else time.monotonic()
        self._found = max(self._found, found)
        return self._found

    def urgent(self) -> bool:
        """Whether the step under way has to be left unfinished."""
        return self.reason() != Reason.NONE and time.monotonic() - self._since > self._patience

    def _take_away(self, path: Path) -> None:
        """Else the next launch would stop, too; a folder of that name is as good as a file."""
        try:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError as error:
            self._file = None
            log.warning(
                "%s: cannot be removed (%s); remove it before the next launch, which it would stop", shown(path), error.strerror
            )

    def _look(self) -> Reason:
        if received_signals:
            return Reason.TERMINATED if any(number in ENDING for number, _ in received_signals) else Reason.SIGNAL
        if self._file is None:
            return Reason.NONE
        now = time.monotonic()
        if self._deadline is not None and time.time() > self._deadline:
            return Reason.DEADLINE
        if self._walltime is not None and now - self._start > self._walltime:
            return Reason.WALLTIME
        if now >= self._next_look:  # a parallel file system dislikes a look per step
            self._next_look = now + 0.5
            if self._file.exists():
                self._take_away(self._file)
                return Reason.STOP_FILE
        return Reason.NONE
