"""Work that each rank does by itself, for seconds or hours, without a collective until all have left it.

Any rank can cancel it (:class:`Cancellation`), the root polls for news of the others (:class:`News`), and what travels last is
drained before the next collective. :func:`share_out` is the whole of it, for pieces of work of which a record is kept.
"""

import logging
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import numpy as np

from dzhpc.errors import DzhpcError
from dzhpc.job.lock import Lock
from dzhpc.job.log import Line
from dzhpc.job.stopping import Reason, Requests
from dzhpc.job.world import World

log = logging.getLogger("dzhpc")
CANCEL = 1  # the tag of the empty message by which a rank ends what all are doing
NEWS = 2  # the tag of what a rank tells the root
SAVE_EVERY = 10.0  # seconds of work that a kill may cost
SEND_EVERY = 0.5  # seconds between two messages to the root
WAIT = 0.02  # seconds between two looks at a request
Piece = TypeVar("Piece")
Known = TypeVar("Known")


class Stopped(DzhpcError):
    """Raised on all ranks where one of them was asked to stop, and nothing is kept of what was under way."""

    def __init__(self, reason: Reason):
        super().__init__(f"stopped: {reason.text}; nothing is kept, the same command begins again")
        self.reason, self.exit_code = reason, reason.exit_code


class Cancellation:
    """How one rank ends a loop that all ranks are in, each by itself: an empty message to all others."""

    def __init__(self, world: World):
        self._world, self._requests = world, None

    def cancel(self) -> None:
        """Tell all ranks to leave the loop; does not wait for them."""
        if self._requests is None:
            others = (rank for rank in range(self._world.size) if rank != self._world.rank)
            self._requests = [self._world.side.Isend(bytearray(0), rank, CANCEL) for rank in others]

    def cancelled(self) -> bool:
        """Whether some rank has cancelled; polled between two pieces of work."""
        return self._requests is not None or (self._world.size > 1 and self._world.side.Iprobe(tag=CANCEL))

    def drain(self) -> None:
        """Receive every message, so that none is left for the next loop. Collective: all ranks, once all have left the loop."""
        for rank, cancelled in enumerate(self._world.allgather(self._requests is not None)):
            if cancelled and rank != self._world.rank:
                self._world.side.Recv(bytearray(0), rank, CANCEL)
        for request in self._requests or ():
            request.Wait()
        self._requests = None


class News:
    """Small values that the ranks send to the root, which polls for them."""

    def __init__(self, world: World):
        self._world, self._requests = world, []  # of messages that may still be on their way
        self._sent = self._received = 0

    def send(self, value) -> None:
        """From another rank to the root; does not wait for it."""
        self._requests = [request for request in self._requests if not request.Test()]
        self._requests.append(self._world.side.isend(value, 0, NEWS))
        self._sent += 1

    def poll(self) -> list:
        """On the root: what came since it last looked, in the order of each rank; does not wait."""
        values = []
        while message := self._world.side.improbe(tag=NEWS):
            values.append(message.recv())
        self._received += len(values)
        return values

    def drain(self) -> list:
        """On the root all that was sent and not yet received, on others []. Collective, once nobody sends any more."""
        values, counts = [], self._world.gather(self._sent)
        if self._world.is_root:
            while self._received < sum(counts):
                values.append(self._world.side.recv(tag=NEWS))
                self._received += 1
        for request in self._requests:
            request.Wait()
        self._world.bcast(None)  # nobody sends for the next loop before the root has all of this one
        return values


class Campaign(Protocol[Known, Piece]):
    """Pieces of work that ranks share, and the record of them. What is not collective runs on one rank, and may fail there."""

    def open(self) -> Known | None:
        """On the root, under the lock: what is done already; None if all is."""

    def pieces(self, known: Known) -> list[Piece]:
        """On every rank, the same: what is left to do."""

    def work(self, piece: Piece) -> Iterator[None]:
        """Do a piece; yields where it may be left."""

    def news(self, piece: Piece) -> object:
        """What the root is told of a piece: every half second, when it is done, when it is left."""

    def keep(self, piece: Piece) -> None:
        """On the rank that does a piece: save it, every ten seconds, when it is done, when it is left."""

    def receive(self, news: list) -> None:
        """On the root: take note."""

    def save(self) -> None:
        """On the root: write what was received, every ten seconds, and when all ranks have left, after a failure too."""

    def progress(self) -> str:
        """On the root: one line."""

    def close(self) -> bool:
        """On the root, when all ranks have left without a failure: whether all is done."""


def share_out(world: World, campaign: Campaign, lock: Lock, requests: Requests, quiet: bool) -> Reason:
    """Do a campaign on all ranks; why that ended, NONE when all is done. Collective.

    Each rank does every size-th piece, by itself, until all are done, or until some rank fails or is asked to stop. Raises what
    the campaign raises, and LaunchError where another job holds the lock, which ``campaign.open`` takes.
    """
    line = Line(quiet or not world.is_root)
    try:
        known = world.on_root(campaign.open)
        if known is None:
            return Reason.NONE
        _Sharing(world, campaign, requests, line).run(campaign.pieces(known)[world.rank :: world.size])
        done = world.on_root(campaign.close)
        return Reason.NONE if done else Reason(world.maximum(int(requests.reason())))
    finally:
        line.close()
        lock.release()


class _Sharing:
    """One rank's part in a campaign."""

    def __init__(self, world: World, campaign: Campaign, requests: Requests, line: Line):
        self._world, self._campaign, self._requests, self._line = world, campaign, requests, line
        self._cancellation, self._news = Cancellation(world), News(world)
        self._sent_at, self._saved_at, self._any_news = 0.0, time.monotonic(), False

    def run(self, mine: list) -> None:
        with self._world.together():
            try:
                self._work(mine)
            except BaseException:
                self._cancellation.cancel()
                raise
            finally:
                self._wait_for_all()
                self._save()
        if news := self._news.drain():
            self._receive(news)
        self._cancellation.drain()

    def _work(self, mine: list) -> None:
        for piece in mine:
            kept_at = time.monotonic()
            for _ in self._campaign.work(piece):
                if self._poll():
                    self._tell(piece)
                    self._campaign.keep(piece)
                    return
                if time.monotonic() - self._sent_at > SEND_EVERY:
                    self._tell(piece)
                if time.monotonic() - kept_at > SAVE_EVERY:
                    self._campaign.keep(piece)
                    kept_at = time.monotonic()
            self._tell(piece)
            self._campaign.keep(piece)

    def _tell(self, piece) -> None:
        self._sent_at, news = time.monotonic(), self._campaign.news(piece)
        self._receive([news]) if self._world.is_root else self._news.send(news)

    def _receive(self, news: list) -> None:
        self._any_news = True
        self._campaign.receive(news)

    def _poll(self) -> bool:
        """Whether to leave; on the root also the news, the record, the line."""
        if self._requests.reason():
            self._cancellation.cancel()
        if self._world.is_root:
            if news := self._news.poll():
                self._receive(news)
            if time.monotonic() - self._saved_at > SAVE_EVERY:
                self._save()
            if self._any_news:
                self._line.say(self._campaign.progress)
        return self._cancellation.cancelled()

    def _save(self) -> None:
        if self._world.is_root:
            self._campaign.save()
        self._saved_at = time.monotonic()

    def _wait_for_all(self) -> None:
        """Wait until every rank has left its work, and make progress meanwhile. Collective."""
        barrier = self._world.side.Ibarrier()
        while not barrier.Test():
            self._poll()
            time.sleep(WAIT)


def split(world: World, requests: Requests, n: int, evaluate: Callable[[range], np.ndarray]) -> np.ndarray:
    """As :meth:`World.split`, index by index, so that it can be left between two. Raises Stopped on all ranks. Collective."""
    cancellation, values = Cancellation(world), [evaluate(range(0))]  # of no index: the shape of what follows

    def one_by_one(mine: range) -> np.ndarray:
        for k in mine:
            if requests.reason():
                cancellation.cancel()
            values.append(evaluate(range(k, k + 1)) if not cancellation.cancelled() else np.zeros((1, *values[0].shape[1:])))
        return np.concatenate(values)

    joined = world.split(n, one_by_one)
    cancellation.drain()
    if reason := Reason(world.maximum(int(requests.reason()))):
        raise Stopped(reason)
    return joined
