"""HDF5 files: written whole or not at all, checked before they are read. The only module that imports h5py.

Every file is written under a temporary name, flushed to the disk and renamed, so that a reader never sees half a file. It
starts with a 512-byte user block that holds a SHA-256 of the rest; the sum is verified before HDF5 parses a byte.
What a kind of file holds is written down where its content belongs: checkpoints, LPR and metrics beside this module, packed data
in data, trajectories and certificates with their tasks.
"""

import contextlib
import datetime
import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from h5py import Dataset, File, Group

from dzhpc.config.paths import at_once, shown
from dzhpc.errors import DzhpcError, InputError

VERSION = 1
BLOCK = 512
MAGIC = b"dzhpc sha256 "
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write(path: Path, kind: str, fill: Callable[[File], None], error: type[DzhpcError]) -> None:
    """Write a file of a kind: ``fill`` puts the content into it. Raises ``error``; then the old file, if any, is whole."""
    image = io.BytesIO()  # HDF5 leaves a disk that is full with a broken file and noise; plain bytes fail cleanly
    with File(image, "w", userblock_size=BLOCK) as file:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        file.attrs.update(format=kind, format_version=VERSION, creator="dzhpc", created=now)
        try:
            fill(file)
        except UnicodeEncodeError as failure:
            raise error(f"{shown(path)}: cannot hold the name {failure.object!r}, which is no UTF-8 text; rename it") from None
        file.attrs["complete"] = True
    content = image.getbuffer()[BLOCK:]
    path = replaceable(path, error)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write((MAGIC + hashlib.sha256(content).hexdigest().encode()).ljust(BLOCK, b"\0"))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as failure:
        raise error(unwritten(path, failure)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def unwritten(path: Path, failure: OSError) -> str:
    """What to say of a file that could not be written, and what helps."""
    first = "free space, or " if failure.errno in FULL else ""
    if not path.parent.exists():
        first = f"make {shown(path.parent)}, or "
    return f"{shown(path)}: cannot be written ({failure.strerror or failure}); {first}choose another folder"


def replaceable(path: Path, error: type[DzhpcError]) -> Path:
    """The file to put in a path's place: what a link leads to. Raises ``error`` for a device, a pipe or a folder."""
    there = Path(os.path.realpath(path))
    if there.exists() and not there.is_file():
        raise error(f"{shown(path)}: cannot be written (it is no regular file); choose another")
    return there


def plain(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A plain HDF5 file of named arrays, for a program that is not ours."""
    with File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


@contextlib.contextmanager
def opened(path: Path, kind: str | None, error: type[DzhpcError]) -> Iterator[File]:
    """Open a file of ours after its checksum was verified; the same file, though another may take its name meanwhile."""
    with contextlib.ExitStack() as stack:
        try:
            raw = stack.enter_context(open(path, "rb", opener=at_once))
            block = raw.read(BLOCK)
            if not block.startswith(MAGIC):
                raise error(f"{shown(path)}: not a file written by dzhpc, or its beginning is damaged")
            if hashlib.file_digest(raw, "sha256").hexdigest().encode() != block[len(MAGIC) : len(MAGIC) + 64]:
                raise error(f"{shown(path)}: damaged (its SHA-256 does not match): cut short or altered after it was written")
            file = stack.enter_context(File(raw, "r"))
        except OSError as failure:
            raise error(f"{shown(path)}: cannot be read ({failure.strerror or failure})") from None
        try:
            found, version = " ".join(str(file.attrs["format"]).split()), int(file.attrs["format_version"])
            if kind is not None and found != kind:
                raise error(f"{shown(path)}: holds {found}, expected {kind}")
            if version > VERSION:
                raise error(f"{shown(path)}: format version {version}, this program reads up to {VERSION}; update dzhpc")
            yield file
        except (
            OSError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
        ) as failure:  # as h5py says that something is not there
            raise error(f"{shown(path)}: is whole, but not as dzhpc writes it ({' '.join(str(failure).split())})") from None


def is_ours(path: str | Path) -> bool:
    """Whether the file begins like one of ours."""
    with open(path, "rb", opener=at_once) as file:
        return file.read(len(MAGIC)) == MAGIC


def describe(path: str | Path) -> str:
    """What a file of ours holds, as text. Raises InputError for anything else."""
    lines = []
    with opened(Path(path), None, InputError) as file:
        lines += [f"{k} = {v}" for k, v in file.attrs.items()]

        def show(name: str, item) -> None:
            what = f"{item.dtype} {list(item.shape)}" if isinstance(item, Dataset) else ""
            lines.append("  ".join(part for part in (f"/{name}", what, *(f"{k}={v}" for k, v in item.attrs.items())) if part))

        file.visititems(show)
    return "\n".join(lines)


def attributes(group: Group) -> dict[str, object]:
    """Those of a group, as plain Python values."""
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in group.attrs.items()}
