"""Verb: pruning scores -> layer-wise pruning ratios. ``mpirun -n 8 python -m dzhpc.prune inputs/resnet20.toml -o lpr.h5``"""

if __name__ == "__main__":  # before torch loads, which takes seconds: a rank may lose its launcher in that time
    from dzhpc.job import process

    process.die_with_launcher()

import argparse

from dzhpc import config as configuration
from dzhpc.config import paths
from dzhpc.job import device as devices
from dzhpc.job.launch import run_verb, start, survey
from dzhpc.job.world import World
from dzhpc.training.launch import task_of
from dzhpc.training.scoring import check, score


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "dzhpc.prune", description="Score the initial weights by queries; write layer-wise pruning ratios (LPR)."
    )
    p.add_argument("input", help="TOML input file; its [sparsity] section says how")
    p.add_argument("-o", "--out", required=True, type=paths.option, help="the LPR file, for sparsity.lpr")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; may be repeated")
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb on every rank; the exit code."""
    config = start(world, lambda: check(configuration.load(args.input, args.set), args.out), args.input, stops=False)
    device = devices.choose(world.local_rank, config.run.threads)
    task = task_of(world, config, device, restarts=False)
    survey(world, device, config.run, task.engine.environment)
    score(world, task, args.out)
    return 0


if __name__ == "__main__":
    run_verb(parser(), main)
