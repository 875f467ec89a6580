"""Verb: reference trajectories for the solver in the loop. ``mpirun -n 2 python -m dzhpc.simulate inputs/sol.toml -o wake.h5``"""

if __name__ == "__main__":  # before torch loads, which takes seconds: a rank may lose its launcher, or be warned, in that time
    from dzhpc.job import process, stopping

    process.die_with_launcher()
    stopping.listen()

import argparse
import logging
import socket
import sys
from pathlib import Path

from dzhpc import config as configuration
from dzhpc.errors import InputError
from dzhpc.job import device as devices
from dzhpc.job import log as metrics
from dzhpc.job.stopping import Reason, listen, tell_job_script
from dzhpc.job.world import World, run_verb
from dzhpc.tasks.sol.simulation import Simulations
from dzhpc.tasks.sol.solvers import make_solver

log = logging.getLogger("dzhpc")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "dzhpc.simulate", description="Run the fine solver for all parameters of [task]; go on where a file was left."
    )
    p.add_argument("input", help='TOML input file of a task.kind = "sol"')
    p.add_argument("-o", "--out", required=True, type=Path, metavar="FILE", help="the reference file, NAME.h5 for data.name")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; may be repeated")
    p.add_argument("--quiet", action="store_true", help="warnings and errors only")
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb on every rank; the exit code."""
    listen()
    metrics.set_up_log(world.is_root, args.quiet, until_first=True)
    config = world.on_root(lambda: check(configuration.load(args.input, args.set), args.out))
    if world.is_root:  # after a collective: all ranks listen
        tell_job_script("LISTENING")
    device = devices.choose(world.local_rank, config.run.threads)
    ranks = world.gather((world.rank, socket.gethostname(), devices.describe(device), devices.uuid(device)))
    world.on_root(lambda: devices.check_binding(ranks, config.run.share_gpu))
    with world.together():
        sys.path.insert(0, str(Path(args.input).resolve().parent))  # the user's own modules may lie beside the input
        solver = make_solver(config.task, device)
    reason = Simulations(world, config, solver, args.out, args.quiet).run()
    if reason and world.is_root:
        tell_job_script(reason.name)
        log.info("stopped: %s; the same command goes on", reason.text)
    return Reason(reason).exit_code


def check(config: configuration.Config, out: Path) -> configuration.Config:
    """Raise InputError for what could not be simulated or written."""
    if config.task.kind != "sol":
        raise InputError(f'task.kind = "{config.task.kind}", expected "sol"')
    for key in ("train_parameters", "valid_parameters", "test_parameters"):
        values = getattr(config.task, key)
        if not values:
            raise InputError(f"task.{key} = []: expected at least one parameter")
        if not configuration.is_function(config.task.simulator) and min(values) <= 0:
            raise InputError(f"task.{key} = {values}: expected numbers above 0, 1e4 / viscosity each")
    if not out.parent.is_dir():
        raise InputError(f"{out}: the folder {out.parent} does not exist")
    return config


if __name__ == "__main__":
    run_verb(parser(), main)
