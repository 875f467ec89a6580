"""Verb: run or restart a campaign. ``mpirun -n 8 python -m dzhpc.train inputs/resnet20.toml``"""

if __name__ == "__main__":
    from dzhpc.job.stopping import guard

    guard()

import argparse

from dzhpc import config as configuration
from dzhpc.config import paths
from dzhpc.config.options import number
from dzhpc.config.values import Positive
from dzhpc.errors import InputError
from dzhpc.files import curves
from dzhpc.job import device as devices
from dzhpc.job.launch import run_verb, start, survey
from dzhpc.job.log import show
from dzhpc.job.world import World
from dzhpc.training import launch
from dzhpc.training.forecast import Forecast
from dzhpc.training.stepmodel import INFINIBAND, measured_network


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("dzhpc.train", description="Train by function queries alone; restart where a run was left.")
    p.add_argument("input", nargs="?", help="TOML input file; without one the defaults of inputs/resnet20.toml")
    p.add_argument("--run-dir", type=paths.option, help="the run folder (default: run.dir/run.name)")
    p.add_argument(
        "--restart",
        default="auto",
        metavar="auto|never|FILE",
        help="auto: from the newest valid checkpoint, if any; FILE: a checkpoint or a run folder",
    )
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, e.g. zo.mu=1e-3; may be repeated"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="validate, print the resolved input, forecast hours and memory; write nothing"
    )
    p.add_argument(
        "--target-hours", type=number(Positive), metavar="H", help="with --dry-run: how many ranks end the run within H hours"
    )
    p.add_argument("--quiet", action="store_true", help="warnings and errors only")
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb on every rank; the exit code."""

    def load() -> configuration.Config:
        if args.target_hours is not None and not args.dry_run:
            raise InputError("--target-hours: says how many ranks a run needs, and belongs to --dry-run")
        return configuration.load(args.input, args.set)

    config = start(world, load, args.input, quiet=args.quiet, until_first=not args.dry_run)
    device = devices.choose(world.local_rank, config.run.threads)
    folder = args.run_dir or configuration.path_of(config, "run.dir") / config.run.name
    restart = args.restart if args.restart in ("auto", "never") else str(paths.absolute(args.restart))
    restarts = world.on_root(lambda: launch.restarts(folder, restart))
    task = launch.task_of(world, config, device, restarts)
    launch.try_out(world, task, restarts)
    if args.dry_run:
        network = measured_network(world) or INFINIBAND
        if world.is_root:
            show(f"{config.to_toml()}\n{Forecast(task, network).text(args.input, args.target_hours)}")
        return 0
    ranks = survey(world, device, config.run, task.engine.environment)
    draw = lambda path: curves.write([path], path / "report")  # noqa: E731
    return launch.run(world, task, folder, restart, ranks, draw, args.quiet).exit_code


if __name__ == "__main__":
    run_verb(parser(), main)
