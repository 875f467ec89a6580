"""Verb: bring a data set to where compute nodes can read it, as one packed HDF5 file.

``python -m dzhpc.fetch cifar10 --root data`` downloads; ``--from FOLDER`` packs what is already there. Run it on a node with
network access, before the job: nothing is downloaded inside a run. One file instead of 60,000 spares a parallel file system.
"""

import argparse
from pathlib import Path

from dzhpc.config import paths
from dzhpc.data import fetching
from dzhpc.job.launch import run_verb
from dzhpc.job.log import set_up_log, show
from dzhpc.job.world import World


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("dzhpc.fetch", description="Download or pack a data set into ROOT/NAME.h5.")
    p.add_argument("name", help="cifar10, or any name for an image folder given by --from")
    p.add_argument("--root", type=paths.option, default=Path("data"), help="where data sets lie (default: data)")
    p.add_argument(
        "--from",
        dest="folder",
        type=paths.option,
        help="pack this folder: cifar-10-batches-py or its parent, or train/ and val/ with images",
    )
    p.add_argument("--size", type=int, help="image folder: pixels of a side after resizing and centre-cropping")
    p.add_argument("--url", default=fetching.URL, help="cifar10: another place of cifar-10-python.tar.gz")
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb; the exit code."""
    set_up_log(world.is_root)
    path = world.on_root(lambda: fetching.fetch(**vars(args)))
    if world.is_root:
        show(f"written: {paths.shown(path)}")
    return 0


if __name__ == "__main__":
    run_verb(parser(), main, parallel=False)
