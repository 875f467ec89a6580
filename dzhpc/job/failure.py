"""How a job fails: every error is said once, tracebacks go to a file, and no rank is left waiting for one that failed."""

import contextlib
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from dzhpc.config.paths import shown
from dzhpc.errors import (
    BlackBoxError,
    DzhpcError,
    OutsideError,
    exit_code_of,
    is_of_a_file,
    is_out_of_memory,
    message_of,
    say_error,
)

PATIENCE = 2.0  # seconds that a failing rank waits to see whether all others fail, too


class RankError(DzhpcError):
    """What failed on one rank, raised on all of them, with that error's exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def keep_traceback(error: BaseException, rank: int, folder: Path | None) -> str:
    """Where the traceback of an exception nobody foresaw went, as " (...)": a file in ``folder``, else standard error and "".

    Of a program that failed, where its files are kept.
    """
    if isinstance(error, BlackBoxError) and error.__cause__ is not None:
        error = error.__cause__  # the user's own code
    if isinstance(error, OutsideError) and error.folder is not None:
        return _keep_files(error.folder, rank, folder)
    if isinstance(error, OutsideError) and error.text:
        return _keep_text(error.text, rank, folder)
    if isinstance(error, (DzhpcError, KeyboardInterrupt)) or is_out_of_memory(error) or is_of_a_file(error):
        return ""
    return _keep_text("".join(traceback.format_exception(error)), rank, folder)


def _keep_text(text: str, rank: int, folder: Path | None) -> str:
    if folder is not None and folder.is_dir():
        path = folder / f"crash-rank{rank}.txt"
        with contextlib.suppress(OSError):
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return f" (traceback in {shown(path)})"
    say_error(text.rstrip())
    return ""


def _keep_files(files: Path, rank: int, folder: Path | None) -> str:
    """Move a program's files out of its scratch folder, once."""
    try:
        if not files.is_dir():
            return ""
        if folder is not None and folder.is_dir():
            kept = folder / f"failed-rank{rank}"
            shutil.rmtree(kept, ignore_errors=True)
        else:
            kept = Path(tempfile.mkdtemp(prefix="dzhpc-failed-"))
        for path in files.iterdir():
            kept.mkdir(exist_ok=True)
            shutil.move(path, kept)
        shutil.rmtree(files, ignore_errors=True)
    except OSError:
        return ""
    return f" (its files are kept in {shown(kept)})"


def fail(comm, error: BaseException, folder: Path | None, on_failure: Callable[[str, int], None]) -> int:
    """Say the error once and end the job; its exit code.

    Where all ranks fail together the first of them speaks and all leave; a rank that fails alone speaks and aborts the job.
    comm: a communicator that is used for nothing else. folder: for tracebacks. on_failure: called by the rank that speaks.
    """
    message, code = message_of(error) + keep_traceback(error, comm.rank, folder), exit_code_of(error)

    def speak(text: str) -> None:
        say_error(text)
        on_failure(text, code)

    if comm.size == 1:
        speak(message)
        return code
    barrier, end = comm.Ibarrier(), time.monotonic() + PATIENCE
    while not barrier.Test():
        if time.monotonic() > end:
            speak(f"rank {comm.rank}: {message}")
            comm.Abort(code)
        time.sleep(0.01)
    messages = comm.allgather(message)
    if comm.rank == 0:
        speak(message if len(set(messages)) == 1 else f"rank 0: {message}")
    comm.barrier()  # a rank that left earlier would make mpirun kill the root before it has spoken
    return code
