"""Ranks and what they say to one another: the only module that imports mpi4py.

MPI starts when a :class:`World` is made, never on import. All buffers are host memory; no CUDA-aware MPI is assumed.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dzhpc.errors import BlackBoxError, LaunchError, exit_code_of, leave_fork, message_of
from dzhpc.job import alone as single
from dzhpc.job import failure, process
from dzhpc.job.failure import RankError


class World:
    """The ranks of this job, and the seconds spent in their collectives (``comm_s``).

    A process that no launcher started is the only rank, and MPI is not touched: it may be missing, or refuse to start here.
    alone: be that one also where a launcher has started others. ``side``: a second communicator, for what goes on beside the
    collectives. ``node``: one of the ranks of this node alone. Raises LaunchError where MPI cannot be loaded.
    """

    def __init__(self, alone: bool = False):
        if not alone:
            process.die_with_launcher()
        self._mpi = single if alone or not process.launched() else _mpi()
        self._comm = self._mpi.COMM_WORLD
        self.rank, self.size = self._comm.rank, self._comm.size
        self.node = self._comm.Split_type(self._mpi.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = self.node.rank, self.node.size
        _unname_segments(self.node)
        self.side = self._comm.Dup()  # a failing rank must not be taken for a partner in another collective
        self.comm_s, self._pid = 0.0, os.getpid()
        self.crash_folder: Path | None = None
        self.on_failure: Callable[[str, int], None] = lambda message, code: None

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    @property
    def library(self) -> str:
        """The MPI in use and its version."""
        return self._mpi.Get_library_version().split("\n")[0].split(",")[0]

    @property
    def everyone(self):
        """The communicator of all ranks."""
        return self._comm

    def leaders(self):
        """A communicator of the first ranks of all nodes, the root being its first; None on other ranks. Collective."""
        found = self._comm.Split(0 if self.local_rank == 0 else self._mpi.UNDEFINED)
        return found if found != self._mpi.COMM_NULL else None

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        if os.getpid() != self._pid:
            leave_fork()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.comm_s += time.perf_counter() - start

    def bcast(self, value):
        """Root's value on every rank. Any object is pickled: for what is not part of a step."""
        with self._timed():
            return self._comm.bcast(value)

    def bcast_numbers(self, values: np.ndarray | None) -> np.ndarray:
        """Root's whole numbers [n], int64, on every rank; others' n does not count."""
        with self._timed():
            size = np.array([0 if values is None else len(values)])
            self._comm.Bcast(size)
            out = np.ascontiguousarray(values, np.int64) if self.is_root else np.zeros(size[0], np.int64)
            self._comm.Bcast(out)
        return out

    def bcast_into(self, values: np.ndarray) -> None:
        """Overwrite ``values`` by the root's, of the same shape and dtype."""
        with self._timed():
            self._comm.Bcast(values)

    def scatter_numbers(self, pieces: list[np.ndarray] | None) -> np.ndarray:
        """``pieces[rank]`` of root's list: whole numbers [n], int64, n being each piece's own."""
        with self._timed():
            sizes = np.array([len(piece) for piece in pieces] if self.is_root else [], np.int64)
            size = np.zeros(1, np.int64)
            self._comm.Scatter(sizes, size)
            out = np.zeros(size[0], np.int64)
            sent = [np.concatenate(pieces).astype(np.int64), _places(sizes)] if self.is_root else None
            self._comm.Scatterv(sent, out)
        return out

    def gather(self, value) -> list | None:
        """Root gets every rank's value, in rank order; others None."""
        with self._timed():
            return self._comm.gather(value)

    def allgather(self, value) -> list:
        """Every rank gets every rank's value, in rank order."""
        with self._timed():
            return self._comm.allgather(value)

    def gather_numbers(self, values: np.ndarray, counts: np.ndarray) -> np.ndarray | None:
        """Root: all ranks' numbers [sum of counts], one rank after another; others None.

        values: counts[rank] numbers, of the same dtype on all ranks.
        """
        out = np.empty(counts.sum(), values.dtype) if self.is_root else None
        with self._timed():
            self._comm.Gatherv(np.ascontiguousarray(values), [out, _places(counts)] if self.is_root else None)
        return out

    def exchange_numbers(self, pieces: list[np.ndarray], counts: np.ndarray) -> np.ndarray:
        """``pieces[rank]`` of all ranks' lists [sum of counts], one rank after another.

        counts: how many numbers each rank has for this one; of the same dtype on all ranks.
        """
        sent, out = np.concatenate([piece.ravel() for piece in pieces]), np.empty(counts.sum(), pieces[0].dtype)
        with self._timed():
            self._comm.Alltoallv([sent, _places(np.array([piece.size for piece in pieces]))], [out, _places(counts)])
        return out

    def join(self, pieces: np.ndarray) -> np.ndarray:
        """Allreduce of arrays with disjoint supports: each entry is one rank's number plus zeros, so the sum is exact.

        One trap: -0.0 + 0.0 is +0.0, so a single rank would keep a sign that two ranks lose; adding 0.0 first mends it.
        """
        out = pieces + 0.0
        with self._timed():
            self._comm.Allreduce(self._mpi.IN_PLACE, out, op=self._mpi.SUM)
        return out

    def minimum(self, values: np.ndarray) -> np.ndarray:
        """The smallest of each entry over the ranks."""
        out = values.copy()
        with self._timed():
            self._comm.Allreduce(self._mpi.IN_PLACE, out, op=self._mpi.MIN)
        return out

    def maximum(self, value: int) -> int:
        """The largest value over the ranks."""
        out = np.array([value])
        with self._timed():
            self._comm.Allreduce(self._mpi.IN_PLACE, out, op=self._mpi.MAX)
        return int(out[0])

    def split(self, n: int, evaluate: Callable[[range], np.ndarray]) -> np.ndarray:
        """``evaluate(range(n))`` [n, ...], its indices dealt out to the ranks and the results joined on all of them."""
        mine = range(self.rank, n, self.size)
        values = np.asarray(evaluate(mine))
        out = np.zeros((n, *values.shape[1:]), values.dtype)
        out[mine] = values
        return self.join(out)

    def counters(self) -> "Counters":
        """Shared counters of pieces of work. Collective."""
        return Counters(self._mpi, self._comm)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block without collectives on every rank; if it fails on any, it fails on all, with the first rank's message."""
        caught = failed = None
        try:
            yield
        except BaseException as error:  # a user's sys.exit included: the others must not wait for this rank
            caught, failed = error, (message_of(error), exit_code_of(error))
        failures = [(rank, *f) for rank, f in enumerate(self.allgather(failed)) if f]
        if failures:
            rank, message, code = failures[0]
            kept = self._keep_traceback(caught) if rank == self.rank else ""
            if any(code == BlackBoxError.exit_code for *_, code in failures):  # where a program's files are
                message += self.allgather(kept)[rank]
            local = 0 < len(failures) < self.size and rank > 0
            raise RankError(f"rank {rank}: {message}" if local else message, code)

    def first_message(self, error: BaseException | None) -> str:
        """The message of the first rank that comes with an error, on all ranks; "" where none does. Collective."""
        messages = self.allgather(message_of(error) + self._keep_traceback(error) if error else "")
        failed = [rank for rank, message in enumerate(messages) if message]
        if not failed:
            return ""
        first = failed[0]
        return messages[first] if len(failed) == self.size else f"rank {first}: {messages[first]}"

    def on_root(self, function: Callable):
        """``function()`` evaluated by the root, its value or its error on every rank."""
        value = None
        with self.together():
            if self.is_root:
                value = function()
        return self.bcast(value)

    def numbers_of_root(self, function: Callable[[], Sequence[float]], n: int) -> np.ndarray:
        """``function()`` evaluated by the root, its ``n`` numbers or its error on every rank; only an error is pickled."""
        out, error = np.zeros(n + 1), None
        if self.is_root:
            try:
                out[1:] = function()
            except BaseException as caught:
                error, out[0] = caught, 1
        self.bcast_into(out)
        if out[0]:
            with self.together():
                if error:
                    raise error
        return out[1:]

    def _keep_traceback(self, error: BaseException) -> str:
        return failure.keep_traceback(error, self.rank, self.crash_folder)

    def fail(self, error: BaseException) -> int:
        """Say the error once and end the job; the exit code, see :func:`dzhpc.job.failure.fail`."""
        if os.getpid() != self._pid:
            leave_fork(error)
        return failure.fail(self.side, error, self.crash_folder, self.on_failure)


class Counters:
    """On each rank a counter that all ranks may count up, without its rank taking part (one-sided, MPI-3).

    There are two, used in turn: while all use one, the other can go back to 0.
    """

    def __init__(self, mpi, comm):
        self._mpi, self._rank, self._turn = mpi, comm.rank, 0
        self._window = mpi.Win.Allocate(2 * 8, 8, comm=comm)
        self._window.Lock_all()
        self._to_zero(0)
        self._to_zero(1)
        comm.Barrier()

    def next(self, rank: int) -> int:
        """Count a rank's counter up; what it was: nobody else gets that number before the next :meth:`turn`."""
        return self._fetch(1, rank, self._turn, self._mpi.SUM)

    def turn(self) -> None:
        """Go on with the other counter, from 0. Every rank calls it once between two collectives, then counts no more."""
        self._turn = 1 - self._turn
        self._to_zero(self._turn)

    def _to_zero(self, turn: int) -> None:
        self._fetch(0, self._rank, turn, self._mpi.REPLACE)

    def _fetch(self, value: int, rank: int, turn: int, operation) -> int:
        given, found = np.array([value], np.int64), np.zeros(1, np.int64)
        self._window.Fetch_and_op(given, found, rank, turn, operation)
        self._window.Flush(rank)
        return int(found[0])


def _places(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many numbers of an array are each rank's, and where they begin."""
    return counts, np.cumsum(counts) - counts


def _mpi():
    """The module ``mpi4py.MPI``, which starts MPI on import."""
    try:
        from mpi4py import MPI
    except Exception as error:  # the package is missing, or its library is, or is none that it knows
        reason = " ".join(str(error).split())
        raise LaunchError(
            f"MPI cannot be loaded ({type(error).__name__}: {reason}), but a launcher started this process; build mpi4py "
            f"against the launcher's MPI (INSTALL.md), or start one process without a launcher"
        ) from None
    return MPI


def _unname_segments(node) -> None:
    """Take the names of Open MPI's shared memory away once all ranks of a node have mapped it; the memory stays.

    Open MPI removes these files itself, but not when it is killed, and never those of a process without mpirun.
    """
    names = process.mapped_segments()
    if all(found == names for found in node.allgather(names)) and len(names) == node.size and node.rank == 0:
        for name in names:
            with contextlib.suppress(OSError):
                os.unlink(name)
