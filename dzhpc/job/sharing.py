"""What the root has read, on every rank: large arrays lie once in the memory of each node."""

import contextlib
import mmap
import os
import pickle
from collections.abc import Callable
from io import BytesIO
from typing import TypeVar

import numpy as np
import torch

from dzhpc.job.world import World

SMALL = 2**20  # bytes: fewer go to each rank
ALIGN = 64  # bytes: where an array begins
PIECE = 2**30  # bytes of one message: MPI counts up to 2^31
Read = TypeVar("Read")


def read_once(world: World, read: Callable[[], Read]) -> Read:
    """The root's ``read()`` on every rank. Collective; what the root raises is raised on all ranks.

    Arrays and dense tensors in it lie once on each node, and keep their strides; a rank that writes into one gets a copy of that
    page. Where a node gives no such memory, each of its ranks has its own. All else is pickled.
    """
    if world.size == 1:
        return read()
    skeleton, arrays = b"", []
    with world.together():
        if world.is_root:
            skeleton, arrays = pack(read())
    skeleton, sizes = world.bcast((skeleton, [array.nbytes for array in arrays]))
    starts = np.cumsum([0, *(-(-size // ALIGN) * ALIGN for size in sizes)]).tolist()
    memory = _spread(world, arrays, starts)
    return pickle.loads(skeleton, buffers=[memory[start : start + size] for start, size in zip(starts, sizes, strict=False)])


def pack(value: object) -> tuple[bytes, list[memoryview]]:
    """(a pickle without the contents of its arrays and dense tensors, their contents)."""
    file, found = BytesIO(), []
    _Packer(file, protocol=5, buffer_callback=found.append).dump(value)
    return file.getvalue(), [buffer.raw() for buffer in found]


class _Packer(pickle.Pickler):
    """Pickles a dense tensor as an array [numel] in the order of its memory."""

    def reducer_override(self, value):
        if type(value) is not torch.Tensor or value.device.type != "cpu" or value.requires_grad or value.layout != torch.strided:
            return NotImplemented
        flat = value.permute(sorted(range(value.ndim), key=lambda k: -value.stride(k)))
        if not flat.is_contiguous() or not value.numel() or value.dtype == torch.bfloat16:  # numpy has no such
            return NotImplemented
        return _tensor, (flat.reshape(-1).numpy(), tuple(value.shape), value.stride())


def _tensor(flat: np.ndarray, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    return torch.as_strided(torch.from_numpy(flat), shape, stride)


def _spread(world: World, arrays: list[memoryview], starts: list[int]) -> memoryview:
    """The arrays of the root in one piece of memory of each node, or of each rank. Collective."""
    total, path, memory, file = starts[-1], "", None, -1
    leaders = world.leaders()  # the first rank of each node
    if total < SMALL:
        memory = _received(world, memoryview(bytearray(total)), arrays, starts)
        return _bcast(world.everyone, memory)
    if leaders is not None:
        file, memory = _make(total)
        path = f"/proc/{os.getpid()}/fd/{file}" if file >= 0 else ""
        memory = _bcast(leaders, _received(world, memory, arrays, starts))
    path = world.node.bcast(path)
    opened = _open(path, total)
    if not all(world.node.allgather(opened is not None)):
        opened = _bcast(world.node, memory if memory is not None else memoryview(bytearray(total)))
    if file >= 0:
        os.close(file)
    return opened


def _received(world: World, memory: memoryview, arrays: list[memoryview], starts: list[int]) -> memoryview:
    """``memory``, which on the root then holds the arrays."""
    for array, start in zip(arrays if world.is_root else [], starts, strict=False):
        memory[start : start + array.nbytes] = array
    return memory


def _bcast(ranks, memory: memoryview) -> memoryview:
    """Fill ``memory`` with what that of the first rank holds."""
    for start in range(0, len(memory) if ranks.size > 1 else 0, PIECE):
        ranks.Bcast(memory[start : start + PIECE])
    return memory


def _make(total: int) -> tuple[int, memoryview]:
    """(a file without a name, which ends with the last process that uses it, its memory); (-1, own memory) without one."""
    with contextlib.suppress(OSError, AttributeError):
        file = os.memfd_create("dzhpc")
        try:
            os.posix_fallocate(file, 0, total)
            return file, memoryview(mmap.mmap(file, total))
        except OSError:
            os.close(file)
    return -1, memoryview(bytearray(total))


def _open(path: str, total: int) -> memoryview | None:
    """The memory of a node, in which what is written is copied first; None where there is none, or this rank may not see it."""
    try:
        with open(path, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), total, access=mmap.ACCESS_COPY))
    except (OSError, ValueError):
        return None
