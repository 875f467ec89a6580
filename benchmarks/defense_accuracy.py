"""Defences side by side on the same noisy test images: accuracy, and the paired difference to the first.

    mpirun -n 2 python benchmarks/defense_accuracy.py runs/given.toml runs/zo runs/autograd --images 10000

Each SOURCE is a run folder, a checkpoint or an input file, as for ``python -m dzhpc.certify``. One draw of noise an image, the
same for all and that of training's evaluations. The standard error of a paired difference is that of the mean of
correct_a - correct_b over the images; the intervals of the accuracies themselves are wider, for they hold the images' own spread.
"""

import argparse

import numpy as np
import torch

from dzhpc.job import device as devices
from dzhpc.job.launch import run_verb
from dzhpc.job.world import World
from dzhpc.tasks.defense.inference import evaluation_noise, load_defense

PART = 500  # images between two ranks' turns


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sources", nargs="+", metavar="SOURCE")
    p.add_argument("--images", type=int, default=10_000, help="the first so many of the test set")
    p.add_argument("--no-denoiser", action="store_true", help="the bare classifier, too (of the first source)")
    return p


def correct(world: World, source: str, images: int, bare: bool) -> np.ndarray:
    """Whether each of the first test images is classified right, bool [images]; the ranks share them."""
    defense = load_defense(source, devices.choose(world.local_rank, 1), without_denoiser=bare)
    test, starts = defense.data.test, range(0, images, PART)

    def evaluate(mine: range) -> np.ndarray:
        rows = np.zeros((len(mine), PART))
        for row, k in zip(rows, mine, strict=True):
            numbers = range(starts[k], min(starts[k] + PART, images))
            clean = defense.data.normalise(test.images[numbers.start : numbers.stop])
            noisy = clean + evaluation_noise(clean, numbers, defense.config)
            row[: len(numbers)] = (defense.classify(noisy) == test.labels[numbers.start : numbers.stop]).cpu()
        return rows

    return world.split(len(starts), evaluate).ravel()[:images]


def main(world: World, args: argparse.Namespace) -> int:
    """Print the table on the root."""
    sources = [(s, False) for s in args.sources] + ([(args.sources[0], True)] if args.no_denoiser else [])
    columns = [correct(world, source, args.images, bare) for source, bare in sources]
    if world.is_root:
        print(f"{args.images} images, torch {torch.__version__}\n")
        print("| defence | accuracy | difference to the first | standard error of the difference |")
        print("|---" * 4 + "|")
        for (source, bare), column in zip(sources, columns, strict=True):
            d = column - columns[0]
            error = d.std(ddof=1) / np.sqrt(len(d))
            name = f"{source}, without denoiser" if bare else source
            print(f"| {name} | {100 * column.mean():.2f} % | {100 * d.mean():+.2f} | {100 * error:.2f} |")
    return 0


if __name__ == "__main__":
    run_verb(parser(), main)
