"""Verb: reference trajectories for the solver in the loop. ``mpirun -n 2 python -m dzhpc.simulate inputs/sol.toml -o wake.h5``"""

if __name__ == "__main__":
    from dzhpc.job.stopping import guard

    guard()

import argparse

from dzhpc import config as configuration
from dzhpc.config import paths
from dzhpc.job import device as devices
from dzhpc.job.launch import run_verb, start, stopped, survey
from dzhpc.job.world import World
from dzhpc.tasks.sol.simulation import Simulations, check
from dzhpc.tasks.sol.solvers import make_solver


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "dzhpc.simulate", description="Run the fine solver for all parameters of [task]; go on where a file was left."
    )
    p.add_argument("input", help='TOML input file of a task.kind = "sol"')
    p.add_argument(
        "-o", "--out", required=True, type=paths.option, metavar="FILE", help="the reference file, NAME.h5 for data.name"
    )
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; may be repeated")
    p.add_argument("--quiet", action="store_true", help="warnings and errors only")
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb on every rank; the exit code."""
    load = lambda: check(configuration.load(args.input, args.set), args.out)  # noqa: E731
    config = start(world, load, args.input, quiet=args.quiet, until_first=True)
    device = devices.choose(world.local_rank, config.run.threads)
    survey(world, device, config.run)
    with world.together():
        solver = make_solver(config.task, device)
    job = Simulations(world, config, solver, args.out, args.quiet)
    reason = job.run()
    return stopped(world, reason, job.progressed, "state")


if __name__ == "__main__":
    run_verb(parser(), main)
