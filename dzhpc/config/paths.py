"""Paths that a user gives, in the input or on the command line: ``~`` and ``$VAR`` are expanded, and a later chdir is no matter.

A relative path is meant from where the program was started. The user's own code may change the working directory whenever it
runs, so paths are made absolute against that folder before they are used, and shown relative to it again.
"""

import argparse
import errno
import os
import re
import stat
import time
from pathlib import Path
from typing import BinaryIO

from dzhpc.errors import InputError

VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)
LARGEST = 2**24  # bytes of an input file; what goes on and on is none
NO_WRITER, SILENT = 5.0, 60.0  # seconds to wait for a pipe that nobody writes to; for one whose writer is silent
_started: Path | None = None  # where a verb was started; without one the working directory of the moment counts


def start_here() -> None:
    """From now on relative paths are meant from the present working directory. Raises InputError where there is none."""
    global _started
    try:
        _started = Path.cwd()
    except OSError as error:
        raise InputError(f"the working directory cannot be used ({error.strerror}); change to one that exists") from None


def started() -> Path:
    """The folder that relative paths are meant from."""
    return _started or Path.cwd()


def expanded(text: str | Path, what: str = "") -> str:
    """A path with ``~``, ``~user``, ``$VAR`` and ``${VAR}`` expanded, as a shell does it.

    what: what an error calls the path. Raises InputError for a variable that is not set, or a user who does not exist.
    """
    given = os.fspath(text)
    what = what or given
    if "\0" in given:
        raise InputError(f"{what!r}: a path cannot hold a NUL character")
    for match in VARIABLE.finditer(given):
        if (name := match[1] or match[2]) not in os.environ:
            raise InputError(f"{what}: the variable {name} is not set")
    if given.startswith("~") and os.path.expanduser(given).startswith("~"):
        raise InputError(f"{what}: no home folder is known for {given.split('/')[0]}; a file of this name is ./{given}")
    return os.path.expandvars(os.path.expanduser(given))


def absolute(text: str | Path, what: str = "") -> Path:
    """The same as an absolute path, see :func:`expanded`."""
    return started() / expanded(text, what)


def option(text: str) -> Path:
    """The type of an option of the command line that is a path, see :func:`absolute`."""
    try:
        return absolute(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def shown(path: str | Path) -> str:
    """A path as a person wants to read it: relative where it lies below the folder in which the program was started."""
    path = Path(path)
    return str(path.relative_to(started())) if path.is_absolute() and path.is_relative_to(started()) else str(path)


def at_once(path: str, flags: int) -> int:
    """An opener for ``open`` that does not wait for the other end of a named pipe, which then is an empty file."""
    return os.open(path, flags | os.O_NONBLOCK)


def opened(path: Path) -> BinaryIO:
    """A regular file to read. Raises OSError for what has no end, or never begins: a pipe, a device, a folder."""
    file = open(path, "rb", opener=at_once)  # noqa: SIM115 - the caller closes it
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "it is no regular file", str(path))


def content(path: Path) -> bytes:
    """What a file holds, or a pipe such as ``<(...)``. Raises OSError, InputError for what never begins or never ends."""
    with open(path, "rb", buffering=0, opener=at_once) as file:
        is_pipe, found, end = stat.S_ISFIFO(os.fstat(file.fileno()).st_mode), bytearray(), time.monotonic() + NO_WRITER
        while True:
            part = file.read(2**20)  # None: there is a writer, who is silent
            found += part or b""
            if len(found) > LARGEST:
                raise InputError(f"{shown(path)}: more than {LARGEST >> 20} MiB, so it is no input file")
            if part == b"" and (found or not is_pipe):
                return bytes(found)
            if part:
                end = time.monotonic() + SILENT
                continue
            if time.monotonic() > (end if part == b"" or found else end - NO_WRITER + SILENT):
                raise InputError(f"{shown(path)}: is a pipe to which nobody writes")
            time.sleep(0.02)
