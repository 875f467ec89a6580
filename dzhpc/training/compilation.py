"""Compile before the clock, together: the ranks of a node share out all programs of a run, then each loads what others made."""

import logging
import os
import time
from pathlib import Path

from dzhpc.engines.delta.engine import Delta
from dzhpc.engines.kernels.compiled import Code, tag
from dzhpc.errors import message_of
from dzhpc.job.launch import survey
from dzhpc.job.world import World
from dzhpc.tasks import Task

log = logging.getLogger("dzhpc")


def compile_together(world: World, task: Task, folder: Path) -> float:
    """Make all programs that a task's engine will need; the seconds that it took. A batch must be bound. Collective.

    They lie in ``folder/compiled/`` by instruction set and versions, for a restart on any node that sees the run folder. A rank
    that fails to compile drops all of its programs. Raises LaunchError, before the first step, where some ranks do and others do
    not, as :func:`dzhpc.job.launch.survey` does.
    """
    start, engine = time.monotonic(), task.engine
    compiles = isinstance(engine, Delta) and engine.programs.compiling
    found: list[Code] = []
    with world.together():
        if compiles:
            found = engine.to_compile()
    if not world.maximum(len(found)):
        return 0.0
    _keep_in(world, folder / "compiled" / tag())
    log.info("compiling %d programs, which the ranks of a node share out", len(found))
    failed = _finish(engine, found[world.local_rank :: world.local_size]) if compiles else ""
    world.allgather(None)  # nobody loads before all have made theirs
    failed = failed or (_finish(engine, found) if compiles else "")
    failures = world.allgather(failed)
    if failed:
        engine.programs.give_up(failed)
    if any(failures) and not all(failures):
        survey(world, engine.index.device, task.config.run, engine.environment)
    log.info("compiled in %.1f s", time.monotonic() - start)
    return time.monotonic() - start


def _finish(engine: Delta, codes: list[Code]) -> str:
    """Compile those that are not yet; what went wrong, "" if nothing did."""
    try:
        for code in codes:
            engine.programs.finish(code)
    except Exception as error:  # a compiler may fail in any way
        return message_of(error)
    return "" if engine.programs.compiling else "the compiler failed"


def _keep_in(world: World, place: Path) -> None:
    """Let torch keep compiled code there, on all ranks that see the folder the root makes; others keep it where they did."""

    def make() -> None:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.warning("%s: compiled code is not kept with the run (%s)", place, error.strerror)

    world.on_root(make)
    if place.is_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place)
