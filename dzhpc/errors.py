"""What can go wrong, and the exit code that says so.

| code | meaning |
|---|---|
| 0 | finished, a limit in ``[stop]`` reached, a STOP file found, or nothing left to do |
| 1 | an exception nobody foresaw: a fault of this program, or of a network of the user's in the middle of training |
| 2 | bad input, missing file or data, user code that raises at the start, or sizes for which there is not the memory |
| 3 | a checkpoint that is missing, damaged, of another model or with other frozen keys |
| 4 | bad launch: no MPI job, several ranks on one GPU, unlike nodes, or a run folder that another job is using |
| 5 | numerical failure |
| 6 | the black box (a user's loss, classifier or program) failed, and again when asked again; what is known is saved |
| 75 | stopped early with a checkpoint: submit the same command again |
| 130 | interrupted by the keyboard (Ctrl-C) before it could end in good order |
"""

import contextlib
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import NoReturn

STOPPED_EARLY = 75
INTERRUPTED = 130  # as a shell says it: 128 + SIGINT
LONGEST = 1000  # characters of a message that somebody else has made
NOT_THE_USERS = (
    str(Path(__file__).parent),
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    "<",
)


class DzhpcError(Exception):
    """An error with one line for the user and an exit code. The line names what was found, expected, and to do next."""

    exit_code = 1


class InputError(DzhpcError):
    """Bad input: a key, a file, a data set, or a model that cannot be used as asked."""

    exit_code = 2


class CheckpointError(DzhpcError):
    """A checkpoint cannot be read, written, or continued."""

    exit_code = 3


class LaunchError(DzhpcError):
    """The processes are no MPI job, share a GPU, would compute unlike bits, or work in a run folder that another job is using."""

    exit_code = 4


class NumericalError(DzhpcError):
    """NaN or infinity where a number was needed; names rank, coordinate and step."""

    exit_code = 5


class ReplicaError(NumericalError):
    """The replicated state differs between ranks, so no later number could be trusted."""


class BlackBoxError(DzhpcError):
    """The user's function or classifier raised, and did so again; the cause is chained."""

    exit_code = 6


class OutsideError(BlackBoxError):
    """What failed in a process of its own: a program, or a Python function under a time limit.

    folder: the program's files, which whoever says the error keeps. text: the function's traceback.
    """

    def __init__(self, message: str, folder: Path | None = None, text: str = ""):
        super().__init__(message)
        self.folder, self.text = folder, text


def message_of(error: BaseException) -> str:
    """One line: the user's message, or type, text and place of an exception nobody foresaw."""
    if isinstance(error, DzhpcError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by the keyboard (Ctrl-C)"
    text = _text(error)
    if is_out_of_memory(error):
        return f"out of memory: {text or type(error).__name__}; ask for less, or give the job more"
    if is_of_a_file(error):
        return f"{error.filename}: cannot be used ({error.strerror or type(error).__name__}){_place(error, of_any=False)}"
    return f"{type(error).__name__}{f': {text}' if text else ''}{_place(error)}"


def _text(error: BaseException) -> str:
    """What an exception says, in one line that is not too long."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # a class of the user's own may fail in that, too
        return ""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _place(error: BaseException, of_any: bool = True) -> str:
    """Where an exception came from: the innermost line of the user's code, or ``of_any`` where there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(NOT_THE_USERS)]
    return next((f", at {f.filename}:{f.lineno} in {f.name}" for f in reversed(own or (frames if of_any else []))), "")


def exit_code_of(error: BaseException) -> int:
    """The documented code of an error of ours, of the keyboard, the memory or a file; 1 for any other."""
    if isinstance(error, DzhpcError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return InputError.exit_code if is_out_of_memory(error) or is_of_a_file(error) else 1


def is_of_a_file(error: BaseException) -> bool:
    """Whether the system refused a file by its name: no right to it, no place for it, a name that is too long."""
    return isinstance(error, OSError) and error.filename is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy or torch found no memory, on the host or on a GPU."""
    torchs = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in _text(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and torchs)


def say_error(text: str) -> None:
    """A line on standard error, which may be closed, or a file on a full disk."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def leave_fork(error: BaseException | None = None) -> NoReturn:
    """End a process that user code has forked and let come back: it would speak to the other ranks as if it were this one."""
    if isinstance(error, SystemExit) and isinstance(error.code, int | None):  # sys.exit is how it meant to end
        os._exit(error.code or 0)
    came = f"left by {message_of(error)}" if error else "came back from it"
    say_error(f"a process that user code forked {came}; end it with os._exit")
    os._exit(1)
