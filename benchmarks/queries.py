"""Loss and accuracy against queries: the same problem, the same rates to choose from, as run folders that restart.

    python benchmarks/queries.py cnn --set model.depth=2 --methods sgd,gauss-newton --seeds 0,1,2 --out FOLDER
    python benchmarks/queries.py cnn --part 0.3333 ...         # the others get that part of the first method's queries
    python benchmarks/queries.py oscillator --out FOLDER       # beside SciPy's Nelder-Mead and least_squares, and CMA-ES

Each method's learning rate is the best one of RATES with the first seed, by the loss of its last evaluation; all seeds are then
run with it. Each schedule ends with the method's queries. Written: ``queries.md``. CMA-ES is that of the package cma.
"""

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from dzhpc.errors import NumericalError
from dzhpc.files.metrics import load_columns

HERE = Path(__file__).resolve().parent.parent
CNN = [
    *("model.name=cnn", "data.batch_size=128", "data.train_limit=10000", "data.augment=false", "zo.mu=1e-3"),
    *("sparsity.ratio=0.95", "sparsity.prune=all", "sparsity.scores=random", "sparsity.redraw_steps=1"),
    *("optim.weight_decay=0.0", "eval.every_epochs=1", "checkpoint.every_minutes=2"),
]
RATES = {
    "sgd": (0.1, 0.3, 1.0, 3.0),
    "adam": (1e-3, 3e-3, 1e-2, 3e-2),
    "gauss-newton": (0.03, 0.1, 0.3, 1.0),
    "rge": (1e-3, 1e-2, 1e-1, 1.0),
}
FORWARD = "zo.estimator=fg-w"  # exact slopes: what RGE's noise of differences costs
WARM_UP = 0.06  # of a run
RGE = ["zo.estimator=rge"]
METHODS = {  # name -> (whose rates, keys)
    "sgd": ("sgd", []),
    "adam": ("adam", ["optim.name=adam"]),
    "gauss-newton": ("gauss-newton", ["optim.name=gauss-newton", "optim.damping=0.01"]),
    "sgd-adaptive": ("sgd", ["sparsity.pattern=adaptive"]),
    "gauss-newton-adaptive": ("gauss-newton", ["optim.name=gauss-newton", "optim.damping=0.01", "sparsity.pattern=adaptive"]),
    "gauss-newton-decrease": (
        "gauss-newton",
        ["optim.name=gauss-newton", "optim.damping=0.01", "sparsity.pattern=adaptive", "sparsity.measure=decrease"],
    ),
    **{f"rge-{q}": ("rge", [*RGE, f"zo.q={q}", "sparsity.ratio=0.0"]) for q in (1, 16, 192)},
    **{f"rge-{q}-plain": ("rge", [*RGE, f"zo.q={q}", "sparsity.ratio=0.0", "optim.momentum=0.0"]) for q in (1, 16, 192)},
    **{f"fzoo-{q}": ("rge", ["zo.estimator=fzoo", f"zo.q={q}", "sparsity.ratio=0.0"]) for q in (16, 192)},
    **{f"fg-w-{q}": ("rge", [FORWARD, f"zo.q={q}", "sparsity.ratio=0.0"]) for q in (1, 16, 192)},
}


def run(args: argparse.Namespace, method: str, rate: float, seed: int) -> tuple[dict, dict]:
    """Train in a run folder, or go on there; the columns of its metrics."""
    name = f"{method}-{rate:g}-{seed}"
    keys = [*CNN, *METHODS[method][1], *args.set, f"optim.lr={rate}", f"run.seed={seed}", f"run.name={name}"]
    steps = steps_of(args, method)
    images = next((int(key.split("=")[1]) for key in reversed(keys) if key.startswith("data.train_limit=")), 0)
    epochs = steps / (images // 128)
    keys += [f"stop.epochs={epochs}", f"optim.warmup_epochs={WARM_UP * epochs}", f"run.dir={args.out}"]
    command = [sys.executable, "-m", "dzhpc.train", "--quiet", *(word for key in keys for word in ("--set", key))]
    code = subprocess.run(command, check=False, cwd=HERE).returncode
    if code not in (0, NumericalError.exit_code):
        raise SystemExit(f"{name}: exit code {code}")
    if code:  # diverged, perhaps before anything was written: no rate to choose
        return dict.fromkeys(("step", "queries"), np.zeros(1)), {"step": np.zeros(1), "accuracy": [np.nan], "loss": [np.inf]}
    return load_columns(args.out / name / "metrics.h5")


def steps_of(args: argparse.Namespace, method: str) -> int:
    """So many that all methods ask as often as they may: a step of CGE asks |S| + 1 times, one of q directions q + 1."""
    q = next((int(key.split("=")[1]) for key in METHODS[method][1] if key.startswith("zo.q=")), args.active)
    return max(1, int(args.queries * (1 if method == args.methods[0] else args.part)) // (q + 1))


def cnn(args: argparse.Namespace) -> str:
    """The table of the methods: accuracy and loss at the end, and queries to where the first one ends, mean over the seeds."""
    found: dict[str, list] = {}
    lines = [
        "| method | rate | steps | test accuracy in % | loss | to the first's accuracy, of its queries, by the evaluations |",
        "|---" * 6 + "|",
    ]
    for method in args.methods:
        rates = RATES[METHODS[method][0]]
        losses = {rate: run(args, method, rate, args.seeds[0])[1]["loss"][-1] for rate in rates}
        rate = min(losses, key=lambda r: losses[r] if np.isfinite(losses[r]) else np.inf)
        found[method] = [run(args, method, rate, seed) for seed in args.seeds]
        shares = []
        for (train, evaluation), (_, measure) in zip(found[method], found[args.methods[0]], strict=True):
            queries = np.interp(evaluation["step"], train["step"], train["queries"])
            there = np.flatnonzero(evaluation["accuracy"] >= measure["accuracy"][-1])
            shares.append(queries[there[0]] / args.queries if len(there) else np.nan)
        accuracy, loss = (np.array([e[key][-1] for _, e in found[method]]) for key in ("accuracy", "loss"))
        spread = lambda a: f"{a.mean():.4g} ± {a.std(ddof=1) if len(a) > 1 else 0:.2g}"  # noqa: E731
        say = ", ".join("never" if np.isnan(s) else f"{s:.2f}" for s in shares)
        steps = steps_of(args, method)
        lines.append(f"| {method} | {rate:g} of {rates} | {steps} | {spread(100 * accuracy)} | {spread(loss)} | {say} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def oscillator(args: argparse.Namespace) -> str:
    """Queries until the loss of examples/own_loss is within 1 % of its minimum."""
    from scipy.optimize import least_squares, minimize

    sys.path.insert(0, str(HERE / "examples"))
    own = importlib.import_module("own_loss")
    problem, asked = own.Oscillator(), []

    def residuals(theta: np.ndarray) -> np.ndarray:
        found = problem.residuals(theta[None], 0)[0]
        asked.append(np.mean(found**2))
        return found

    def loss(theta: np.ndarray) -> float:
        return float(np.mean(residuals(theta) ** 2))

    least = least_squares(residuals, problem.initial(), xtol=1e-12, ftol=1e-12, gtol=1e-12).cost * 2 / len(own.TIMES)
    lines = ["| method | queries to within 1 % of the minimum |", "|---|---|"]

    def row(name: str, work) -> None:
        asked.clear()
        work()
        there = np.flatnonzero(np.array(asked) <= 1.01 * least)
        lines.append(f"| {name} | {there[0] + 1 if len(there) else f'not in {len(asked)}'} |")

    for method in ("trf", "lm", "dogbox"):
        row(f"scipy least_squares, {method}", lambda m=method: least_squares(residuals, problem.initial(), method=m))
    row("scipy Nelder-Mead", lambda: minimize(loss, problem.initial(), method="Nelder-Mead", options={"maxfev": 5000}))
    try:
        import cma

        row(
            "CMA-ES (cma), sigma 0.3",
            lambda: cma.fmin2(loss, problem.initial(), 0.3, {"verbose": -9, "seed": 1, "maxfevals": 5000}),
        )
    except ImportError:
        lines.append("| CMA-ES | the package cma is not installed |")
    adam = ["optim.name=adam", "optim.lr=0.1", "zo.difference=central", "zo.mu=1e-3", "stop.epochs=120"]
    for name, keys in (("Gauss-Newton, as in the input", []), ("Adam-CGE", adam)):
        words = [word for key in [*keys, f"run.dir={args.out}", f"run.name={name.split()[0]}"] for word in ("--set", key)]
        subprocess.run([sys.executable, "-m", "dzhpc.train", str(HERE / "examples/own_loss.toml"), "--quiet", *words], check=True)
        train, _ = load_columns(args.out / name.split()[0] / "metrics.h5")
        there = np.flatnonzero(train["loss"] <= 1.01 * least)[0]  # the loss before a step is that of the steps so far
        lines.append(f"| {name} | {int(train['queries'][there - 1]) if there else 0} |")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("problem", choices=["cnn", "oscillator"])
    p.add_argument("--out", type=Path, required=True, help="where the run folders lie")
    p.add_argument("--methods", type=lambda text: text.split(","), default=["sgd", "gauss-newton"], help=", ".join(METHODS))
    p.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all runs")
    p.add_argument("--queries", type=int, default=33_480, help="of each run")
    p.add_argument("--part", type=float, default=1.0, help="of them for all methods but the first")
    p.add_argument("--active", type=int, default=185, help="|S|: 5 %% of the CNN's parameters")
    args = p.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    text = {"cnn": cnn, "oscillator": oscillator}[args.problem](args)
    command = " ".join(["python", "benchmarks/queries.py", *sys.argv[1:]])
    (args.out / "queries.md").write_text(f"`{command}`, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')}\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
