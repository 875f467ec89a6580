"""Pruning scores by themselves: layer-wise pruning ratios for a file, which later runs read."""

import logging
from pathlib import Path

from dzhpc.config import Config
from dzhpc.config.paths import shown
from dzhpc.engines import selfcheck
from dzhpc.engines.pinned import Pinned, seed_others
from dzhpc.errors import InputError
from dzhpc.files.lpr import load_lpr, save_lpr
from dzhpc.job.world import World
from dzhpc.method.seeds import derive
from dzhpc.tasks import Task
from dzhpc.tasks.agreement import check_made
from dzhpc.training.active_set import Pattern

log = logging.getLogger("dzhpc")


def score(world: World, task: Task, out: Path) -> None:
    """Score the initial weights on all ranks and write the ratios. Collective.

    Raises InputError for too many queries, where ranks hold different data or weights, and for a network or a black box that is
    another one at each query.
    """
    check_made(world, task.made())
    with world.together(), Pinned(task.model, task.engine.index.device).unchanged():
        task.try_box()
        task.bind_for_scores(0)
        selfcheck.check(task.engine, task.config.run.seed)
        task.engine.unbind()
    pattern = Pattern(task, world.split)
    check_budget(task.config.task.max_queries, pattern.score_queries)
    seed_others(derive(task.config.run.seed, "scores"))
    lpr = pattern.score()
    world.on_root(lambda: save_lpr(out, lpr, task.engine.index.split(lpr.scores)))
    log.info("%s\nwritten: %s", lpr.table(), shown(out))


def check(config: Config, out: Path) -> Config:
    """Raise InputError before any query is spent on a result that could not be written or would mean nothing."""
    if config.sparsity.ratio == 0:
        raise InputError(
            "sparsity.ratio = 0: nothing would be pruned; give a ratio above 0, for example --set sparsity.ratio=0.9"
        )
    if not out.parent.is_dir():
        raise InputError(f"{shown(out)}: the folder {shown(out.parent)} does not exist")
    if out.is_file():
        try:
            load_lpr(out)
        except InputError as error:
            raise InputError(f"{error}; it would be lost: move it, or choose another file with -o") from None
    config.sparsity.lpr = None
    return config


def check_budget(limit: int | None, queries: int) -> None:
    """Raise InputError where the scores would ask the black box more often than ``task.max_queries``."""
    if limit is not None and queries > limit:
        raise InputError(f"task.max_queries = {limit}: the scores ask {queries:,} times; raise it, or lower sparsity.q")
