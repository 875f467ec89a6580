"""Verb: pruning scores -> layer-wise pruning ratios. ``mpirun -n 8 python -m dzhpc.prune inputs/resnet20.toml -o lpr.h5``"""

if __name__ == "__main__":  # before torch loads, which takes seconds: a rank may lose its launcher in that time
    from dzhpc.job import process

    process.die_with_launcher()

import argparse
import logging
import socket
import sys
from pathlib import Path

from dzhpc import config as configuration
from dzhpc.errors import InputError
from dzhpc.files.lpr import save_lpr
from dzhpc.job import device as devices
from dzhpc.job import log as metrics
from dzhpc.job.world import World, run_verb
from dzhpc.tasks import make_task
from dzhpc.training.active_set import Pattern

log = logging.getLogger("dzhpc")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "dzhpc.prune", description="Score the initial weights by queries; write layer-wise pruning ratios (LPR)."
    )
    p.add_argument("input", help="TOML input file; its [sparsity] section says how")
    p.add_argument("-o", "--out", required=True, type=Path, help="the LPR file, for sparsity.lpr")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; may be repeated")
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb on every rank; the exit code."""
    metrics.set_up_log(world.is_root)
    config = world.on_root(lambda: check(configuration.load(args.input, args.set), args.out))
    device = devices.choose(world.local_rank, config.run.threads)
    ranks = world.gather((world.rank, socket.gethostname(), devices.describe(device), devices.uuid(device)))
    world.on_root(lambda: devices.check_binding(ranks, config.run.share_gpu))
    with world.together():
        sys.path.insert(0, str(Path(args.input).resolve().parent))
        task = make_task(config, device)
    pattern = Pattern(task, world.split)
    check_budget(config.task.max_queries, pattern.score_queries)
    lpr = pattern.score()

    def save() -> None:
        save_lpr(args.out, lpr, task.engine.index.split(lpr.scores))

    world.on_root(save)
    log.info("%s\nwritten: %s", lpr.table(), args.out)
    return 0


def check(config: configuration.Config, out: Path) -> configuration.Config:
    """Raise InputError before any query is spent on a result that could not be written or would mean nothing."""
    if config.sparsity.ratio == 0:
        raise InputError(
            "sparsity.ratio = 0: nothing would be pruned; give a ratio above 0, for example --set sparsity.ratio=0.9"
        )
    if not out.parent.is_dir():
        raise InputError(f"{out}: the folder {out.parent} does not exist")
    config.sparsity.lpr = None
    return config


def check_budget(limit: int | None, queries: int) -> None:
    """Raise InputError where the scores would ask the black box more often than ``task.max_queries``."""
    if limit is not None and queries > limit:
        raise InputError(f"task.max_queries = {limit}: the scores ask {queries:,} times; raise it, or lower sparsity.q")


if __name__ == "__main__":
    run_verb(parser(), main)
