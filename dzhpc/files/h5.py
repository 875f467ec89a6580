"""HDF5 files: written whole or not at all, checked before they are read. The only module that imports h5py.

Every file is written under a temporary name, flushed to the disk and renamed, so that a reader never sees half a file. It
starts with a 512-byte user block that holds a SHA-256 of the rest; the sum is verified before HDF5 parses a byte.
What a kind of file holds is written down where its content belongs: checkpoints, LPR and metrics beside this module, packed data
in data, trajectories and certificates with their tasks.
"""

import contextlib
import datetime
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from h5py import Dataset, File, Group
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin

from dzhpc.config.paths import at_once, shown
from dzhpc.errors import DzhpcError, InputError

VERSION = 1
BLOCK = 512
MAGIC = b"dzhpc sha256 "
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by the size of an element


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
        raise error(
            f"{shown(path)}: cannot be written ({failure.strerror or failure}); free space, or choose another folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


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


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError for the first one that :func:`put_tensors` cannot write."""
    for name, t in tensors.items():
        if t.layout is not torch.strided or t.is_quantized or isinstance(t, UninitializedTensorMixin):
            kind = "not yet initialised" if isinstance(t, UninitializedTensorMixin) else f"of layout {t.layout}, dtype {t.dtype}"
            raise InputError(
                f"the model's {name} is {kind}: a checkpoint holds dense tensors; make it one, or register it as none"
            )


def array(t: Tensor) -> np.ndarray:
    """The content of a tensor; of a dtype that NumPy lacks (bfloat16) as integers, bit for bit."""
    t = t.detach().cpu().contiguous()
    try:
        return t.numpy()
    except TypeError:
        return t.view(BITS[t.element_size()]).numpy()


def put_tensors(group: Group, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name, in their order; an attribute says the dtype where NumPy lacks it."""
    for name, t in tensors.items():
        found = array(t)
        item = group.create_dataset(name, data=found)
        if str(found.dtype) != (dtype := str(t.dtype).removeprefix("torch.")):
            item.attrs["torch"] = dtype
    group.attrs["order"] = list(tensors)


def get_tensors(group: Group) -> dict[str, Tensor]:
    """The tensors of :func:`put_tensors`, on the CPU."""
    return {str(name): _tensor(group[str(name)]) for name in group.attrs["order"]}


def _tensor(item: Dataset) -> Tensor:
    t = torch.from_numpy(np.asarray(item[()]))
    return t.view(getattr(torch, str(item.attrs["torch"]))) if "torch" in item.attrs else t
