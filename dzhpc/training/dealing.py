"""Who evaluates what: pieces of work, and slices of equal cost for any number of ranks. Pure functions: no MPI here."""

import numpy as np

from dzhpc.method.coordinates import balance
from dzhpc.method.estimators import Partial

BASES = 10  # coordinates that a base pass is taken to cost before one was measured
PIECES = 128  # directions are shared out in so many pieces at most, of at most ``engine.at_once``


def pieces(n: int, at_once: int) -> list[range]:
    """Directions 0..n-1 in pieces of at most ``at_once``."""
    size = max(1, min(at_once, -(-n // PIECES)))
    return [range(k, min(k + size, n)) for k in range(0, n, size)]


def deal(
    chunks: list[range], each: np.ndarray, shards: int, ranks: int, base: float = 0.0, partial: Partial | None = None
) -> list[list[range]]:
    """The slice of each rank: chunks of all shards but those in ``partial``, so dealt out that all take about as long.

    chunks: of the units of a shard. each [units]: seconds of a unit. base: seconds of a base pass, for each shard of a rank.
    """
    units, ends = len(each), np.concatenate([[0.0], np.cumsum(each)])
    todo = _missing([range(s * units + c.start, s * units + c.stop) for s in range(shards) for c in chunks], partial)
    costs = [float(ends[(piece.stop - 1) % units + 1] - ends[piece.start % units]) for piece in todo]
    slices = balance(costs, ranks, [piece.start // units for piece in todo], base)
    return [[todo[k] for k in part] for part in slices]


def filled(seconds: np.ndarray) -> np.ndarray:
    """Measured where there is a measurement, else the mean of those; a base pass that of BASES of them. Equal before a step."""
    known = np.isfinite(seconds)
    mean = seconds[:-1][known[:-1]].mean() if known[:-1].any() else 1.0
    guess = np.full(len(seconds), mean)
    guess[-1] = BASES * mean
    return np.where(known, seconds, guess)


def reporters(shards: list[set[int]], count: int) -> list[list[int]]:
    """For each rank the shards that it reports: the first rank with work of a shard does, and some rank where none has any."""
    reports = [[] for _ in shards]
    for shard in range(count):
        has = [rank for rank, own in enumerate(shards) if shard in own]
        reports[has[0] if has else shard % len(shards)].append(shard)
    return reports


def encoded(slices: list[range], reports: list[int]) -> np.ndarray:
    """A rank's slice and reports as whole numbers: how many pieces, where they begin and end, the reports."""
    return np.array([len(slices), *(end for piece in slices for end in (piece.start, piece.stop)), *reports], np.int64)


def decoded(numbers: np.ndarray) -> tuple[list[range], list[int]]:
    """What :func:`encoded` was given."""
    count, *rest = numbers.tolist()
    return [range(*rest[2 * k : 2 * k + 2]) for k in range(count)], rest[2 * count :]


def _missing(pieces: list[range], partial: Partial | None) -> list[range]:
    """The pieces of which anything is still to be evaluated; always whole ones, since their cut may decide the bits."""
    if partial is None:
        return pieces
    return [piece for piece in pieces if not partial.done[piece.start : piece.stop].all()]
