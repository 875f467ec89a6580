"""Verb: certified accuracy by randomized smoothing. ``mpirun -n 4 python -m dzhpc.certify runs/defense --images 200 --n 1000``"""

if __name__ == "__main__":
    from dzhpc.job.stopping import guard

    guard()

import argparse

from dzhpc.config import paths
from dzhpc.job import device as devices
from dzhpc.job.launch import run_verb, start
from dzhpc.job.world import World
from dzhpc.tasks.defense.methods import certify, check


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "dzhpc.certify", description="Certify test images by randomized smoothing; go on where a record was left."
    )
    p.add_argument(
        "sources",
        nargs="+",
        type=paths.option,
        metavar="SOURCE",
        help="run folder, checkpoint or input file; several: one after the other",
    )
    p.add_argument(
        "-o",
        "--out",
        type=paths.option,
        help="folder of the results, or LABEL.h5 (default: certify/ in the run folder, else here)",
    )
    p.add_argument("--label", help="the method's name in files, table and plot (default: that of the source)")
    p.add_argument("--images", type=int, metavar="N", help="so many, spread evenly over the test set (default: all)")
    p.add_argument("--n0", type=int, default=100, help="noisy copies that choose the class (100)")
    p.add_argument("--n", type=int, default=10_000, help="noisy copies that bound its probability (10,000)")
    p.add_argument("--alpha", type=float, default=0.001, help="the risk, for each image, that its certificate is wrong (0.001)")
    p.add_argument("--sigma", type=float, help="the noise's standard deviation, for pixels in [0, 1] (default: the input's)")
    p.add_argument("--adaptive", action="store_true", help="stop an image's sampling once the next radius of the grid is decided")
    p.add_argument("--grid", type=float, default=0.25, help="radii of the table and of --adaptive: 0, GRID, 2 GRID, ... (0.25)")
    p.add_argument("--no-denoiser", action="store_true", help="certify the bare classifier")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the denoiser's inference")
    p.add_argument("--batch", type=int, default=100, help="noisy copies in one call (100)")
    p.add_argument("--quiet", action="store_true", help="warnings and errors only")
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb on every rank; the exit code."""
    start(world, lambda: check(args), quiet=args.quiet, until_first=True)
    return certify(world, args, devices.choose(world.local_rank, 1))


if __name__ == "__main__":
    run_verb(parser(), main)
