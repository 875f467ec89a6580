"""Verb: tables and plots from run folders, certificates, or benchmarks. ``python -m dzhpc.report runs/a runs/b -o compare``"""

import argparse
from collections.abc import Callable
from pathlib import Path

from dzhpc.config import paths
from dzhpc.errors import InputError
from dzhpc.files import benched, curves, study
from dzhpc.job.launch import run_verb
from dzhpc.job.log import show
from dzhpc.job.world import World


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("dzhpc.report", description="Table and plots of one or several runs, or of certificates.")
    p.add_argument(
        "runs", nargs="*", type=paths.option, help="run folders; or .h5 files that `certify` wrote; or .json of `bench`"
    )
    p.add_argument("--campaign", type=paths.option, metavar="DIR", help="all run folders below DIR: their states, and one plot")
    p.add_argument(
        "--against",
        choices=["epoch", "queries", "seconds"],
        help="how much of it each run needs to come as far as the first one ends; one axis, logarithmic",
    )
    p.add_argument(
        "--over",
        metavar="SECTION.KEY",
        help="with --campaign: runs by method (their first folder below DIR) and by this key of their inputs, means over seeds",
    )
    p.add_argument("--beside", type=paths.option, metavar="TSV", help="with --over: published numbers, in table and figure")
    p.add_argument("--study", metavar="NAME", help="with --beside: whose numbers (default: the name of DIR)")
    p.add_argument(
        "-o", "--out", type=paths.option, help="where to write (default: report/ in the folder, or here; beside certificates)"
    )
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb; the exit code."""
    if bool(args.runs) == bool(args.campaign):
        raise InputError("give run folders, or --campaign DIR")
    if args.against and (args.campaign or any(path.suffix in (".h5", ".json") for path in args.runs)):
        raise InputError("--against: compares run folders; leave it out for --campaign, certificates and benchmarks")
    if (args.over and not args.campaign) or (args.beside and not args.over) or (args.study and not args.beside):
        raise InputError("--over needs --campaign, --beside needs --over, --study needs --beside")
    if args.runs and all(path.suffix == ".h5" for path in args.runs):
        return _certified(world, args)
    if args.runs and all(path.suffix == ".json" for path in args.runs):
        return _say(world, lambda: benched.write(args.runs, args.out or args.runs[0].parent))
    one = args.campaign or (args.runs[0] if len(args.runs) == 1 else paths.started())
    out = args.out or one / "report"
    if args.over:
        beside = study.published(args.beside, args.study or args.campaign.resolve().name) if args.beside else []
        return _say(world, lambda: curves.write_study(args.campaign, out, args.over, beside))
    if args.campaign:
        return _say(world, lambda: curves.write_campaign(args.campaign, out))
    return _say(world, lambda: curves.write(args.runs, out, args.against))


def _certified(world: World, args: argparse.Namespace) -> int:
    from dzhpc.tasks.defense import certificates  # tasks need torch

    out = args.out or args.runs[0].parent
    return _say(world, lambda: certificates.write(args.runs, out))


def _say(world: World, write: Callable[[], tuple[str, list[Path]]]) -> int:
    text, files = world.on_root(write)
    if world.is_root:
        show(f"{text}\nwritten: {', '.join(map(paths.shown, files))}")
    return 0


if __name__ == "__main__":
    run_verb(parser(), main, parallel=False)
