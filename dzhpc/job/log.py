"""Seeing it run: the log, and one live line (terminal) or one plain line per interval (file)."""

import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from dzhpc.config.paths import shown
from dzhpc.errors import InputError

INTERVAL = 10.0  # seconds between plain lines
log = logging.getLogger("dzhpc")


class _Console(logging.Handler):
    """Writes through tqdm, so that a live line survives; warnings go to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        text, stream = self.format(record), sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a full disk, a closed pipe, none: lines and nothing else
            tqdm.write(text, file=stream)
            stream.flush()


class _Held(logging.Handler):
    """Keeps records from the handlers behind it until it lets go of them, at the latest when the process ends (``flush``)."""

    def __init__(self, *behind: logging.Handler):
        super().__init__()
        self._behind, self._records = behind, []

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = record.getMessage(), None  # what it speaks of may change before it is said
        self._records.append(record)

    def flush(self) -> None:
        self.let_go()

    def let_go(self, *first: object) -> None:
        """Step aside, let ``first`` be said where it is given, then all that was kept."""
        if self not in log.handlers:
            return
        log.handlers[:] = [*self._behind, *(h for h in log.handlers if h is not self)]
        if first:
            log.info(*first)
        for record in self._records:
            log.handle(record)


def set_up_log(is_root: bool, quiet: bool = False, until_first: bool = False) -> None:
    """The root speaks; other ranks only warn. ``until_first``: nothing is said before :func:`say_first`, or before the end."""
    log.handlers.clear()
    console = _Console()
    console.setFormatter(logging.Formatter("%(message)s"))
    console.setLevel(logging.INFO if is_root and not quiet else logging.WARNING)
    log.addHandler(_Held(console) if until_first else console)
    log.setLevel(logging.INFO)
    log.propagate = False


def say_first(text: str, *args: object) -> None:
    """The line that says how the run began; what was logged before it comes after it. Later ones are lines like others."""
    held = next((handler for handler in log.handlers if isinstance(handler, _Held)), None)
    if held:
        held.let_go(text, *args)
    else:
        log.info(text, *args)


def let_go() -> None:
    """Say the lines that still wait for the one that says how the run began."""
    for handler in list(log.handlers):
        with contextlib.suppress(OSError, ValueError):  # user code may have closed its file
            handler.flush()


def open_streams() -> None:
    """Let standard output and error take any character, and let there be some where the process was started with them closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def close_streams() -> None:
    """Write out what standard output still holds; what it cannot take must not become an error at the end of the process."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):  # AttributeError: user code has set it to None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(text: str) -> None:
    """Print what a verb was asked for. Raises InputError where it cannot be written; that nobody reads on is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        close_streams()
    except OSError as error:
        close_streams()
        raise InputError(f"standard output: cannot be written ({error.strerror})") from None


class _LogFile(logging.FileHandler):
    """A full disk costs lines of the log and nothing else."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def log_to(path: Path) -> None:
    """Append everything to a file, too."""
    try:
        handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        log.warning("%s: no log is written (%s)", shown(path), error.strerror)
        return
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)


def _on_terminal() -> bool:
    """Whether a person sees standard output. Open MPI gives its ranks a pseudo-terminal in any case, so mpirun's own is asked."""
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        return sys.stdout is not None and sys.stdout.isatty()
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{os.getppid()}/fd/1").startswith(("/dev/pts/", "/dev/tty"))
    return False


def duration(seconds: float) -> str:
    """1:27:10."""
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


class Line:
    """One live line on a terminal, else one plain line per interval."""

    def __init__(self, quiet: bool):
        self._quiet, self._next = quiet, 0.0
        self._bar = tqdm(bar_format="{desc}", leave=False) if _on_terminal() and not quiet else None

    def say(self, text: Callable[[], str]) -> None:
        """Print ``text()`` when it is time."""
        now = time.monotonic()
        if self._quiet or now < self._next:
            return
        self._next = now + (INTERVAL if self._bar is None else 0.1)
        if self._bar is None:
            log.info(text())
        else:
            with contextlib.suppress(OSError, ValueError):  # the terminal is gone
                self._bar.set_description_str(text())

    def close(self) -> None:
        """Leave the terminal clean."""
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.close()
