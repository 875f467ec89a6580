"""What a unit of an estimate costs: by which work is dealt out to ranks. Nothing but the time that a step takes depends on it."""

from collections.abc import Callable, Sequence

import numpy as np

from dzhpc.job import device as devices

DIRECTION, BASE = -2, -1  # places behind those of the parameters


class Costs:
    """Seconds per coordinate of each parameter, per direction, per base pass, the least so far: the first time may compile."""

    def __init__(self, engine):
        self._engine = engine
        self.seconds = np.full(len(engine.index.names) + 2, np.inf)  # of each parameter, DIRECTION, BASE
        self._watches: list[tuple[Sequence[int], int, devices.Stopwatch, float]] = []  # of what may still be under way

    def timed(self, places: Sequence[int], count: int, work: Callable):
        """``work()``: ``count`` evaluations whose costs are kept at ``places``; a compiler's time is no part of them."""
        compiled_before = self._engine.compile_s
        with devices.Stopwatch(self._engine.index.device) as watch:
            found = work()
        self._watches.append((places, count, watch, self._engine.compile_s - compiled_before))
        return found

    def note(self) -> None:
        """Keep the costs of all that was timed; a GPU is waited for."""
        for places, count, watch, compiled in self._watches:
            np.minimum.at(self.seconds, places, max(watch.seconds - compiled, 1e-9) / count)
        self._watches.clear()
