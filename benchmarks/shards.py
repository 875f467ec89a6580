"""Accuracy against data.shards: the same problem and seeds, the batch in 1, 2, 4, ... parts, as run folders that restart.

    python benchmarks/shards.py digits --out FOLDER            # by CGE
    python benchmarks/shards.py cnn-standin --out FOLDER       # CNN of depth 2 by autograd on the coordinates of CGE: a stand-in
    python benchmarks/shards.py cnn --out FOLDER               # the same by CGE
    python benchmarks/shards.py cnn --out FOLDER --table       # the table of the runs that are finished, and nothing else

Only data.shards and run.seed differ between the runs of a problem: a seed has the same starting weights and batches for all
numbers of shards, so that differences are taken seed by seed. Written: ``NAME.md`` in FOLDER.
"""

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np

from dzhpc.files.metrics import load_columns

HERE = Path(__file__).resolve().parent.parent
DIGITS = ["zo.compile=off", "eval.every_epochs=10"]
CNN = [
    *("data.train_limit=5000", "model.depth=2", "sparsity.ratio=0.8", "sparsity.q=64", "sparsity.redraw_epochs=1"),
    *("zo.compile=off", "optim.warmup_epochs=1.0", "stop.epochs=12", "eval.every_epochs=6", "data.test_limit=5000"),
]
PROBLEMS = {  # name -> (input, keys)
    "digits": ("inputs/digits.toml", DIGITS),
    "cnn": ("inputs/cnn.toml", CNN),
    "cnn-standin": ("inputs/cnn.toml", [*CNN, "zo.estimator=autograd"]),
}


def run(args: argparse.Namespace, shards: int, seed: int) -> None:
    """Train in a run folder, or go on there."""
    source, keys = PROBLEMS[args.problem]
    keys = [*keys, f"data.shards={shards}", f"run.seed={seed}", f"run.dir={args.out}", f"run.name={args.problem}-{shards}-{seed}"]
    command = [sys.executable, "-m", "dzhpc.train", source, "--quiet", *(word for key in keys for word in ("--set", key))]
    subprocess.run(command, check=True, cwd=HERE)


def finished(args: argparse.Namespace, shards: int, seed: int, steps: int = 0) -> tuple[float, float] | None:
    """(training loss, the mean over the last tenth of the steps; test accuracy in %) of a run that is done."""
    try:
        train, evaluation = load_columns(args.out / f"{args.problem}-{shards}-{seed}" / "metrics.h5")
    except Exception:
        return None
    if not len(evaluation["step"]) or evaluation["step"][-1] != train["step"][-1] or train["step"][-1] < steps:
        return None
    return float(train["loss"][-max(1, len(train["loss"]) // 10) :].mean()), 100 * float(evaluation["accuracy"][-1])


def table(args: argparse.Namespace) -> str:
    """Mean over the seeds and its standard error; the difference to one shard, seed by seed."""
    found = {(n, seed): finished(args, n, seed, args.steps) for n, seed in itertools.product(args.shards, args.seeds)}
    lines = [
        "| shards | images in one | seeds | training loss | test accuracy in % | less 1 shard | per seed |",
        "|---" * 7 + "|",
    ]
    spread = lambda a: f"{a.mean():.4g} ± {a.std(ddof=1) / len(a) ** 0.5 if len(a) > 1 else np.nan:.2g}"  # noqa: E731
    for n in args.shards:
        own = {seed: found[n, seed] for seed in args.seeds if found[n, seed]}
        if not own:
            continue
        loss, accuracy = np.array(list(own.values())).T
        both = [accuracy - found[args.shards[0], seed][1] for seed, (_, accuracy) in own.items() if found[args.shards[0], seed]]
        less = spread(np.array(both)) if both and n != args.shards[0] else ""
        each = ", ".join(f"{value:.2f}" for value in accuracy)
        lines.append(f"| {n} | {128 // n} | {len(own)} | {spread(loss)} | {spread(accuracy)} | {less} | {each} |")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("problem", choices=PROBLEMS)
    p.add_argument("--out", type=Path, required=True, help="where the run folders lie")
    p.add_argument("--shards", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4, 8])
    p.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=0, help="take only runs that have come so far")
    p.add_argument("--table", action="store_true", help="read run folders, run nothing")
    args = p.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        for seed, n in itertools.product(args.seeds, args.shards):
            run(args, n, seed)
    text = table(args)
    command = " ".join(["python", "benchmarks/shards.py", *sys.argv[1:]])
    (args.out / f"{args.problem}.md").write_text(f"`{command}`\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
