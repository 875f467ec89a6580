"""Verb: errors of corrected solvers in long runs. ``mpirun -n 2 python -m dzhpc.evaluate runs/sol runs/FO-SOL -o compare``"""

if __name__ == "__main__":
    from dzhpc.job.stopping import guard

    guard()

import argparse
import logging

from dzhpc.config import look_in, paths
from dzhpc.job import device as devices
from dzhpc.job.launch import run_verb, start, survey
from dzhpc.job.shared_work import split
from dzhpc.job.stopping import Requests
from dzhpc.job.world import World
from dzhpc.tasks.sol import comparison, results
from dzhpc.tasks.sol.evaluation import Experiment, modules_of, read_all

log = logging.getLogger("dzhpc")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "dzhpc.evaluate", description="Mean errors of corrected solvers over the test simulations, and those of the solver alone."
    )
    p.add_argument(
        "sources",
        nargs="+",
        type=paths.option,
        metavar="RUN",
        help="run folder, checkpoint, or input file (SRC, the user's modules)",
    )
    p.add_argument("-o", "--out", type=paths.option, required=True, metavar="DIR", help="folder of the results")
    p.add_argument("--steps", help="mean errors over so many steps (default: 100,500, or what the reference has)")
    p.add_argument(
        "--data-root", type=paths.option, metavar="DIR", help="where the reference file lies (default: the input's data.root)"
    )
    p.add_argument("--gif", action=argparse.BooleanOptionalAction, default=True, help="draw the animation (default: yes)")
    p.add_argument("--quiet", action="store_true", help="warnings and errors only")
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb on every rank; the exit code."""
    runs = start(world, lambda: read_all(args.sources, args.data_root), quiet=args.quiet)
    look_in(*world.on_root(lambda: modules_of(args.sources)))
    device, requests = devices.choose(world.local_rank, runs[0].config.run.threads), Requests(runs[0].config, None)
    survey(world, device, runs[0].config.run)
    with world.together():
        experiment = Experiment(runs[0].config, device)
        at = results.horizons(comparison.steps_of(args.steps), experiment.frames)
    share = lambda n, evaluate: split(world, requests, n, evaluate)  # noqa: E731
    methods = comparison.compare(experiment, [run for run in runs if run.checkpoints], at[-1], share)
    log.info("%s", world.on_root(lambda: comparison.write(experiment, methods, at, args.out, args.gif)))
    return 0


if __name__ == "__main__":
    run_verb(parser(), main)
