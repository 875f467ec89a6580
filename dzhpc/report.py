"""Verb: tables and plots from run folders, or from certificates. ``python -m dzhpc.report runs/a runs/b -o compare``"""

import argparse
from pathlib import Path

from dzhpc.errors import InputError
from dzhpc.files import curves
from dzhpc.job.launch import run_verb
from dzhpc.job.world import World
from dzhpc.tasks.defense import certificates


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("dzhpc.report", description="Table and plots of one or several runs, or of certificates.")
    p.add_argument("runs", nargs="*", type=Path, help="run folders; or .h5 files that `python -m dzhpc.certify` wrote")
    p.add_argument("--campaign", type=Path, metavar="DIR", help="all run folders below DIR: their states, and one plot")
    p.add_argument("-o", "--out", type=Path, help="where to write (default: report/ in the folder, or here; beside certificates)")
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb; the exit code."""
    if bool(args.runs) == bool(args.campaign):
        raise InputError("give run folders, or --campaign DIR")
    if args.runs and all(path.suffix == ".h5" for path in args.runs):
        return _certified(world, args)
    one = args.campaign or (args.runs[0] if len(args.runs) == 1 else Path())
    out = args.out or one / "report"
    text = world.on_root(lambda: curves.write_campaign(args.campaign, out) if args.campaign else curves.write(args.runs, out))
    if world.is_root:
        print(text)
        print(f"written: {out / 'report.md'}, {out / 'curves.png'}")
    return 0


def _certified(world: World, args: argparse.Namespace) -> int:
    out = args.out or args.runs[0].parent
    text = world.on_root(lambda: certificates.write(args.runs, out))
    if world.is_root:
        print(f"{text}\nwritten: {out / 'certified.md'}, {out / 'certified.png'}")
    return 0


if __name__ == "__main__":
    run_verb(parser(), main, parallel=False)
