"""Verb: engines side by side on the same coordinates, an estimate in parts, and a training step on 1, 2, 4, ... ranks.

``python -m dzhpc.bench gradient --model resnet20 --batch 128`` · ``python -m dzhpc.bench scaling inputs/digits.toml --ranks 1,2``
"""

import argparse
import json
from pathlib import Path

from dzhpc.config import paths
from dzhpc.config.options import number
from dzhpc.config.values import Count, Positive, Ratio, Seed, Threads
from dzhpc.errors import InputError
from dzhpc.job.launch import add_user_modules, run_verb
from dzhpc.job.log import show
from dzhpc.job.world import World
from dzhpc.training import benchmark, scaling, stages

PICTURES = (".png", ".pdf", ".svg")  # what a forecast may be drawn as


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("dzhpc.bench", description="What a gradient costs, and how a step scales over ranks.")
    kinds = p.add_subparsers(dest="kind", required=True)
    g = kinds.add_parser("gradient", help="engines side by side: time, memory, and error against float64")
    g.add_argument(
        "--coords", type=number(Count), default=200, help="how many of the coordinates drawn by the LPR over the whole network"
    )
    g.add_argument("--reference", type=number(Count), default=200, help="compare with float64 on so many of them")
    g.add_argument("--ratio", type=number(Ratio), default=0.9, help="sparsity of the LPR (first-order GraSP on this batch)")
    g.add_argument("--directions", type=number(Count), default=16, help="q of the estimates by random directions beside CGE's")
    g.add_argument("--engines", default="full,reuse,delta")
    g.add_argument("--precisions", help="of engine delta (default: fp32,bf16, as far as the hardware has them); others have fp32")
    g.add_argument("--memory-mb", type=number(Positive), help="zo.memory_mb of engine delta")
    t = kinds.add_parser("stages", help="an estimate of d queries in parts: directions, perturbation, inference")
    t.add_argument("--queries", type=number(Count), default=64, help="time so many of the d queries")
    for k in (g, t):
        k.add_argument("--model", default="resnet20", help="resnet20, resnet56, resnet18, vit-tiny, or cnn:DEPTH")
        k.add_argument("--weights", help="start from this file (a checkpoint or a torch state_dict); else random weights")
        k.add_argument("--batch", type=number(Count), default=128, help="images of 32 x 32 random pixels")
        k.add_argument("--mu", type=number(Positive), default=5e-3, help="smoothing parameter")
        k.add_argument("--threads", type=number(Threads), default=1)
        k.add_argument("--repeats", type=number(Count), default=5, help="interleaved repetitions")
        k.add_argument("--seed", type=number(Seed), default=0)
        k.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
        k.add_argument("--json", type=paths.option, help="write the figures here")
    s = kinds.add_parser("scaling", help="seconds a training step on several numbers of ranks")
    s.add_argument("input", help="TOML input file")
    s.add_argument("--ranks", default="1,2", help="numbers of ranks")
    s.add_argument("--steps", type=number(Count), default=5, help="steps of each run; the first, which compiles, does not count")
    s.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; may be repeated")
    s.add_argument("--network", choices=["infiniband", "ethernet"], default="infiniband", help="what the forecast assumes")
    s.add_argument("--plot", type=paths.option, help="draw the forecast here: a .png, .pdf or .svg")
    s.add_argument("--json", type=paths.option, help="write the figures here")
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb (on one rank: ``scaling`` starts its own); the exit code."""
    if world.size > 1:
        raise InputError("dzhpc.bench: start it without mpirun; `scaling` starts the ranks itself")
    if getattr(args, "plot", None) and args.plot.suffix not in PICTURES:
        raise InputError(f"--plot {paths.shown(args.plot)}: expected a name that ends in {', '.join(PICTURES)}")
    for file in filter(None, (args.json, getattr(args, "plot", None))):
        _write(file, "a")  # before all that is measured
    add_user_modules(getattr(args, "input", None))
    measure = {"gradient": benchmark.gradient, "stages": stages.stages, "scaling": scaling.scaling}
    measured, text = measure[args.kind](args)
    show(text)
    if args.json:
        options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        found = json.dumps({"options": options, "machine": benchmark.machine(), **measured}, indent=1)
        _write(args.json, "w", f"{found}\n")
    return 0


def _write(path: Path, mode: str, text: str = "") -> None:
    """Raises InputError where a file cannot be written."""
    try:
        with open(path, mode, encoding="utf-8", opener=paths.at_once) as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"{paths.shown(path)}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    run_verb(parser(), main, parallel=False)
