"""Ranks and what they say to one another: the only module that imports mpi4py.

MPI starts when a :class:`World` is made, never on import. All buffers are host memory; no CUDA-aware MPI is assumed.
"""

import argparse
import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dzhpc.errors import BlackBoxError, DzhpcError, LaunchError, exit_code_of, message_of
from dzhpc.job import process

PATIENCE = 2.0  # seconds that a failing rank waits to see whether all others fail, too
CALL = 1  # the tag of the empty message by which a rank calls off what all are doing
NEWS = 2  # the tag of what a rank tells the root


class RankError(DzhpcError):
    """What failed on one rank, raised on all of them, with that error's exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class World:
    """The ranks of this job, and the seconds spent in their collectives (``comm_s``).

    Raises LaunchError where Slurm started several tasks that do not form one MPI job.
    """

    def __init__(self):
        process.die_with_launcher()
        from mpi4py import MPI

        self._mpi, self._comm = MPI, MPI.COMM_WORLD
        self.rank, self.size = self._comm.rank, self._comm.size
        node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = node.rank, node.size
        _unname_segments(node)
        node.Free()
        self._side = self._comm.Dup()  # a failing rank must not be taken for a partner in another collective
        self._calls: list | None = None
        self._told: list = []  # messages to the root that may still be on their way
        self._told_count = self._heard_count = 0
        self.comm_s = 0.0
        self.crash_folder: Path | None = None
        self.on_failure: Callable[[str, int], None] = lambda message, code: None
        check_launch(self.size)

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    @property
    def library(self) -> str:
        return self._mpi.Get_library_version().split("\n")[0].split(",")[0]

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.comm_s += time.perf_counter() - start

    def bcast(self, value):
        """Root's value on every rank."""
        with self._timed():
            return self._comm.bcast(value)

    def scatter(self, pieces: list | None):
        """``pieces[rank]`` of root's list."""
        with self._timed():
            return self._comm.scatter(pieces)

    def gather(self, value) -> list | None:
        """Root gets every rank's value, in rank order; others None."""
        with self._timed():
            return self._comm.gather(value)

    def allgather(self, value) -> list:
        """Every rank gets every rank's value, in rank order."""
        with self._timed():
            return self._comm.allgather(value)

    def join(self, pieces: np.ndarray) -> np.ndarray:
        """Allreduce of arrays with disjoint supports: each entry is one rank's number plus zeros, so the sum is exact.

        One trap: -0.0 + 0.0 is +0.0, so a single rank would keep a sign that two ranks lose; adding 0.0 first mends it.
        """
        out = pieces + 0.0
        with self._timed():
            self._comm.Allreduce(self._mpi.IN_PLACE, out, op=self._mpi.SUM)
        return out

    def maximum(self, value: int) -> int:
        """The largest value over the ranks."""
        with self._timed():
            return self._comm.allreduce(value, op=self._mpi.MAX)

    def call_off(self) -> None:
        """Tell all ranks to leave the loop that each of them runs by itself; does not wait for them."""
        if self._calls is None:
            self._calls = [self._side.Isend(bytearray(0), rank, CALL) for rank in range(self.size) if rank != self.rank]

    def called_off(self) -> bool:
        """Whether some rank has called off; looked up between two pieces of work."""
        return self._calls is not None or (self.size > 1 and self._side.Iprobe(tag=CALL))

    def settle(self) -> None:
        """Receive every call, so that none is left for the next loop. Collective: all ranks, once all have left the loop."""
        for rank, called in enumerate(self.allgather(self._calls is not None)):
            if called and rank != self.rank:
                self._side.Recv(bytearray(0), rank, CALL)
        for request in self._calls or ():
            request.Wait()
        self._calls = None

    def tell_root(self, value) -> None:
        """Send the root (another rank) a small value; does not wait for it."""
        self._told = [request for request in self._told if not request.Test()]
        self._told.append(self._side.isend(value, 0, NEWS))
        self._told_count += 1

    def heard(self) -> list:
        """What the root has been told since it last looked, in the order of each rank; does not wait."""
        values = []
        while message := self._side.improbe(tag=NEWS):
            values.append(message.recv())
        self._heard_count += len(values)
        return values

    def work_apart(
        self, work: Callable[[], None], look_around: Callable[[], object], hear: Callable[[list], None], leave=lambda: None
    ) -> None:
        """``work()``, each rank by itself until it is done or until some rank fails or calls off. Collective.

        ``look_around()`` is called while a rank waits for the others, ``leave()`` when all are there, after a failure too;
        ``hear`` gets the last of what the root was told.
        """
        with self.together():
            try:
                work()
            except BaseException:
                self.call_off()
                raise
            finally:
                self._wait_for_all(look_around)
                leave()
        hear(self._heard_all())
        self.settle()

    def _wait_for_all(self, meanwhile: Callable[[], object]) -> None:
        """Wait until every rank has come here, calling ``meanwhile`` now and then. Collective."""
        barrier = self._side.Ibarrier()
        while not barrier.Test():
            meanwhile()
            time.sleep(0.02)

    def _heard_all(self) -> list:
        """All that was told and not yet heard, on the root; [] on others. Collective, once nobody tells any more."""
        values, counts = [], self.gather(self._told_count)
        if self.is_root:
            while self._heard_count < sum(counts):
                values.append(self._side.recv(tag=NEWS))
                self._heard_count += 1
        self._comm.barrier()
        return values

    def split(self, n: int, evaluate: Callable[[range], np.ndarray]) -> np.ndarray:
        """``evaluate(range(n))`` [n, ...], its indices dealt out to the ranks and the results joined on all of them."""
        mine = range(self.rank, n, self.size)
        values = np.asarray(evaluate(mine))
        out = np.zeros((n, *values.shape[1:]), values.dtype)
        out[mine] = values
        return self.join(out)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block without collectives on every rank; if it fails on any, it fails on all, with the first rank's message."""
        caught = failure = None
        try:
            yield
        except BaseException as error:  # a user's sys.exit included: the others must not wait for this rank
            caught, failure = error, (message_of(error), exit_code_of(error))
        failures = [(rank, *f) for rank, f in enumerate(self.allgather(failure)) if f]
        if failures:
            rank, message, code = failures[0]
            if rank == self.rank:
                self._keep_traceback(caught)
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

    def _keep_traceback(self, error: BaseException) -> str:
        """Where the traceback of an exception nobody foresaw went: a file in the run folder, else standard error."""
        if isinstance(error, BlackBoxError) and error.__cause__ is not None:
            error = error.__cause__  # the user's own code
        if isinstance(error, (DzhpcError, KeyboardInterrupt)):
            return ""
        text = "".join(traceback.format_exception(error))
        if self.crash_folder is not None and self.crash_folder.is_dir():
            path = self.crash_folder / f"crash-rank{self.rank}.txt"
            with contextlib.suppress(OSError):
                path.write_text(text)
                return f" (traceback in {path})"
        sys.stderr.write(text)
        return ""

    def fail(self, error: BaseException) -> int:
        """Say the error once and end the job.

        Where all ranks fail together the first of them speaks and all leave; a rank that fails alone speaks and aborts the job.
        """
        message, code = message_of(error) + self._keep_traceback(error), exit_code_of(error)
        if self.size == 1:
            print(message, file=sys.stderr, flush=True)
            self.on_failure(message, code)
            return code
        barrier, end = self._side.Ibarrier(), time.monotonic() + PATIENCE
        while not barrier.Test():
            if time.monotonic() > end:
                print(f"rank {self.rank}: {message}", file=sys.stderr, flush=True)
                self.on_failure(f"rank {self.rank}: {message}", code)
                self._comm.Abort(code)
            time.sleep(0.01)
        messages = self._side.allgather(message)
        if self.is_root:
            own = message if len(set(messages)) == 1 else f"rank 0: {message}"
            print(own, file=sys.stderr, flush=True)
            self.on_failure(own, code)
        self._side.barrier()  # a rank that left earlier would make mpirun kill the root before it has spoken
        return code


def _unname_segments(node) -> None:
    """Take the names of Open MPI's shared memory away once all ranks of a node have mapped it; the memory stays.

    Open MPI removes these files itself, but not when it is killed, and never those of a process without mpirun.
    """
    names = process.mapped_segments()
    if all(found == names for found in node.allgather(names)) and len(names) == node.size and node.rank == 0:
        for name in names:
            with contextlib.suppress(OSError):
                os.unlink(name)


def check_launch(size: int) -> None:
    """Raise LaunchError if Slurm started several tasks, each of which believes to be alone.

    Plain ``srun`` without a PMI that this MPI speaks gives N jobs of "rank 0 of 1", which would all write one run folder.
    """
    tasks = int(os.environ.get("SLURM_NTASKS") or 1)
    if tasks > 1 and size == 1 and not process.launched():
        raise LaunchError(
            f"SLURM_NTASKS = {tasks}, but MPI sees 1 rank: srun and this MPI do not know each other; "
            f"start with `mpirun -n {tasks} python -m dzhpc...` or `srun --mpi=pmix`"
        )


def run_verb(parser: argparse.ArgumentParser, main: Callable[[World, argparse.Namespace], int]) -> None:
    """Run a verb on every rank and leave with its exit code; no rank is left waiting for one that failed."""
    try:
        world = World()
    except LaunchError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    try:
        parsed = world.bcast(_parse(parser) if world.is_root else None)  # argparse speaks once, not once a rank
        code = parsed if isinstance(parsed, int) else main(world, parsed)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        _flush_log()
        code = world.fail(error)
    _flush_log()
    sys.exit(code)


def _flush_log() -> None:
    """Let go of lines that still wait for the one that says how the run began."""
    for handler in list(logging.getLogger("dzhpc").handlers):
        handler.flush()


def _parse(parser: argparse.ArgumentParser) -> argparse.Namespace | int:
    try:
        return parser.parse_args()
    except SystemExit as leave:
        return int(leave.code or 0)
