"""Verb: run or restart a campaign. ``mpirun -n 8 python -m dzhpc.train inputs/resnet20.toml``"""

if __name__ == "__main__":
    from dzhpc.job.stopping import guard

    guard()

import argparse
from pathlib import Path

from dzhpc import config as configuration
from dzhpc.files import curves
from dzhpc.job import device as devices
from dzhpc.job.launch import run_verb, start, survey
from dzhpc.job.world import World
from dzhpc.tasks import make_task
from dzhpc.training import launch
from dzhpc.training.forecast import forecast


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("dzhpc.train", description="Train by function queries alone; restart where a run was left.")
    p.add_argument("input", nargs="?", help="TOML input file; without one the defaults of inputs/resnet20.toml")
    p.add_argument("--run-dir", help="the run folder (default: run.dir/run.name)")
    p.add_argument("--restart", default="auto", metavar="auto|never|FILE", help="auto: from the newest valid checkpoint, if any")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, e.g. zo.mu=1e-3; may be repeated"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="validate, print the resolved input, forecast hours and memory; write nothing"
    )
    p.add_argument("--quiet", action="store_true", help="warnings and errors only")
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb on every rank; the exit code."""
    load = lambda: configuration.load(args.input, args.set)  # noqa: E731
    config = start(world, load, args.input, quiet=args.quiet, until_first=not args.dry_run)
    device = devices.choose(world.local_rank, config.run.threads)
    with world.together():
        task = make_task(config, device)
    launch.try_out(world, task)
    if args.dry_run:
        if world.is_root:
            print(forecast(task))
        return 0
    ranks = survey(world, device, config.run, task.engine.environment)
    folder = Path(args.run_dir or Path(config.run.dir) / config.run.name)
    draw = lambda path: curves.write([path], path / "report")  # noqa: E731
    return launch.run(world, task, folder, args.restart, ranks, draw, args.quiet).exit_code


if __name__ == "__main__":
    run_verb(parser(), main)
