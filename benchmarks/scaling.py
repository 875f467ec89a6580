"""How a step scales: forecasts for the large inputs, an event simulation of who gets what, real runs beside forecasts.

    python benchmarks/scaling.py forecast resnet20-90 --out FOLDER [--set KEY=VALUE]     # FOLDER/resnet20-90.json
    python benchmarks/scaling.py table --out FOLDER                                      # table and plot of all that is there
    python benchmarks/scaling.py check --out FOLDER                                      # real runs on 1 and 2 ranks

``forecast`` times pieces of a step by the CPU time of this process, so that the load of the machine matters little, on one
thread. The simulation deals work out as a run does, by what a coordinate of each parameter was seen to cost at least; what each
chunk really takes is what was measured of its neighbours, times a random factor of the measured spread. A base pass, which is
longer, varies less, as a sum of as many independent parts as it is chunks long.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np

from dzhpc import config as configuration
from dzhpc.engines.pinned import Pinned
from dzhpc.job import device as devices
from dzhpc.method.estimators import make_estimator
from dzhpc.tasks import make_task
from dzhpc.training import stepmodel
from dzhpc.training.dealing import deal
from dzhpc.training.forecast import Forecast

HERE = Path(__file__).resolve().parent.parent
PROBLEMS = {
    "resnet20-90": ("inputs/resnet20.toml", []),
    "resnet20-99": ("inputs/resnet20.toml", ["sparsity.ratio=0.99"]),
    "sol": ("inputs/sol.toml", ["optim.name=adam", "stop.epochs=10"]),
    "defense-cifar10": (
        "inputs/defense-cifar10.toml",
        ["optim.name=adam", "data.batch_size=100", "sparsity.ratio=0.3333333", "sparsity.scores=random", "stop.epochs=0.48"],
    ),
}
RANKS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
DRAWS = 3  # simulated steps
# Of a short run: ratios that the forecast knows, and slices by measured cost from the second step on, as a long run has them.
ALIKE = ["zo.compile=off", "sparsity.scores=random", "sparsity.redraw_steps=1"]
CHECKS = {  # short enough for a minute each
    "digits": ("inputs/digits.toml", [], 12),
    "digits, 4 shards": ("inputs/digits.toml", ["data.shards=4"], 8),
    "digits, RGE": ("inputs/digits.toml", ["zo.estimator=rge", "zo.q=256"], 10),
    "CNN of depth 1": ("inputs/cnn.toml", ["sparsity.ratio=0.5"], 6),
    "CNN of depth 3, 2 shards": (
        "inputs/cnn.toml",
        ["model.depth=3", "sparsity.ratio=0.9", "data.shards=2"],
        5,
    ),
    "ResNet-20, 128 images": (
        "inputs/resnet20.toml",
        ["data.batch_size=128", "sparsity.ratio=0.9995", "sparsity.prune=all"],
        4,
    ),
}


def forecast(args: argparse.Namespace) -> None:
    """Write the forecast and the simulation of a problem."""
    stepmodel.time = types.SimpleNamespace(perf_counter=time.process_time)
    source, keys = PROBLEMS[args.problem]
    config = configuration.load(HERE / source, [*keys, *args.set])
    task = make_task(config, devices.choose(0, 1))
    with Pinned(task.model, task.engine.index.device).unchanged():
        task.bind(0)
    found = Forecast(task, stepmodel.ETHERNET if args.network == "ethernet" else stepmodel.INFINIBAND)
    model, spread, rows = found.model, spread_of(task, found), []
    for ranks in RANKS:
        plain, best = model.step(ranks, found.given), model.best(ranks)
        row = {"ranks": ranks, "hours": found.run_s(best) / 3600, "best": best.shards, "bottleneck": best.bottleneck}
        for name, step in (("plain", plain), ("sharded", best)):
            row |= {f"{name}_s": step.seconds}
            row[f"{name}_simulated_s"] = simulated(task, found, ranks, step.shards, spread)
        rows.append(row)
        print(row, flush=True)
    pieces = {n: {"base_s": s.base_s, "queries_s": s.work_s / n, "chunks": len(s.chunks)} for n, s in model.shards.items()}
    series = {n: [model.step(ranks, n).seconds for ranks in stepmodel.RANKS] for n in model.shards}
    about = {"problem": args.problem, "coordinates": len(found.coords), "keys": [*keys, *args.set], "network": model.network.name}
    about |= {"spread": spread, "pieces": pieces, "series": series, "rows": rows, "update_s": model.update_s}
    (args.out / f"{args.problem}.json").write_text(json.dumps(about, indent=1))


def spread_of(task, found: Forecast) -> float:
    """The relative standard deviation of what one chunk takes, by eight tries."""
    estimator, shard = make_estimator(task.config.zo, task.config.run.seed), found.model.shards[found.given]
    if not shard.chunks:
        return 0.0
    chunk, seconds = shard.chunks[len(shard.chunks) // 2], []
    with Pinned(task.model, task.engine.index.device).unchanged():
        task.bind(0)
        for _ in range(8):
            start = time.process_time()
            estimator.evaluate(task.engine, found.coords, 0, chunk)
            seconds.append(time.process_time() - start)
    return float(np.std(seconds[1:]) / np.mean(seconds[1:]))


def simulated(task, found: Forecast, ranks: int, count: int, spread: float) -> float:
    """Seconds of a step, the mean over DRAWS: the slices of a run, and what their chunks really take."""
    shard, draw = found.model.shards[count], np.random.default_rng(ranks + count)
    step = found.model.step(ranks, count)
    if not shard.chunks:
        return step.seconds
    owner = task.engine.index.owner(found.coords)
    least = np.full(owner.max() + 1, np.inf)
    np.minimum.at(least, owner, shard.each)
    slices = deal(shard.chunks, least[owner], count, ranks, shard.base_s if count > 1 else 0.0)
    even = min(1.0, (shard.work_s / count / len(shard.chunks) / shard.base_s) ** 0.5)
    units, ends, busy = len(shard.each), np.concatenate([[0.0], np.cumsum(shard.each)]), np.zeros((DRAWS, ranks))
    for rank, own in enumerate(slices):
        starts = np.array([piece.start % units for piece in own], int)
        expected = ends[starts + np.array([len(piece) for piece in own], int)] - ends[starts]
        bases = np.full(len({piece.start // units for piece in own}) if count > 1 else 1, shard.base_s)
        for k in range(DRAWS):
            busy[k, rank] = (expected * draw.lognormal(0, spread, len(expected))).sum()
            busy[k, rank] += (bases * draw.lognormal(0, spread * even, len(bases))).sum()
    return float(busy.max(1).mean() + step.join_s + step.update_s)


def table(args: argparse.Namespace) -> None:
    """Markdown of all problems, and their plot."""
    from matplotlib.figure import Figure

    files = [args.out / f"{name}.json" for name in PROBLEMS if (args.out / f"{name}.json").exists()]
    figure = Figure(figsize=(9, 3.2 * -(-len(files) // 2)), layout="constrained")
    for k, file in enumerate(files, 1):
        about = json.loads(file.read_text())
        name, size, first = about["problem"], f"{about['coordinates']:,}", about["rows"][0]
        print(
            f"\n### {name}\n\n|S| = {size}; network {about['network']}; a chunk's time varies by {100 * about['spread']:.1f} %.\n"
        )
        print("| shards | base pass of one, s | queries of one, s | chunks |\n|---|---|---|---|")
        for n, p in about["pieces"].items():
            print(f"| {n} | {p['base_s']:.3g} | {p['queries_s']:.4g} | {p['chunks']:,} |")
        of_each = "s a step | simulated | efficiency"
        print(
            f"\n| ranks | shards as given: {of_each} | best shards | {of_each} | run, hours | held back by |",
            "|---" * 10 + "|",
            sep="\n",
        )
        for r in about["rows"]:
            row = [f"{r['ranks']:,}"]
            for kind in ("plain", "sharded"):
                seconds, efficiency = r[f"{kind}_s"], first[f"{kind}_s"] / r[f"{kind}_s"] / r["ranks"]
                row += [str(r["best"])] if kind == "sharded" else []
                row += [f"{seconds:.3g}", f"{r[f'{kind}_simulated_s']:.3g}", f"{100 * efficiency:.0f} %"]
            print(f"| {' | '.join(row)} | {r['hours']:.3g} | {r['bottleneck']} |")
        axes = figure.add_subplot(-(-len(files) // 2), 2, k)
        for n, seconds in about["series"].items():
            axes.loglog(stepmodel.RANKS, seconds, marker=".", label=f"{n} shard{'s' if n != '1' else ''}")
        one = next(iter(about["series"].values()))[0]
        axes.loglog(stepmodel.RANKS, [one / n for n in stepmodel.RANKS], "k:", label="no waiting")
        axes.set(title=about["problem"], xlabel="ranks", ylabel="seconds a step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(args.out / "scaling.png", dpi=110)


def check(args: argparse.Namespace) -> None:
    """Real steps on 1 and 2 ranks beside the forecast of this machine."""
    print("| problem | ranks | s a step | forecast | off by | communication |", "|---" * 6 + "|", sep="\n")
    worst, found = 0.0, args.out / "check.json"
    for name, (source, keys, steps) in CHECKS.items():
        words = ["--ranks", "1,2", "--steps", str(steps), *(w for key in [*ALIKE, *keys, *args.set] for w in ("--set", key))]
        command = [sys.executable, "-m", "dzhpc.bench", "scaling", source, *words, "--json", str(found)]
        subprocess.run(command, check=True, cwd=HERE, stdout=subprocess.DEVNULL)
        for row in json.loads(found.read_text())["rows"]:
            off = row["forecast_s"] / row["step_s"] - 1
            worst = max(worst, abs(off))
            print(f"| {name} | {row['ranks']} | {row['step_s']:.3g} | {row['forecast_s']:.3g} | {100 * off:+.0f} % | ", end="")
            print(f"{100 * row['communication']:.0f} % |", flush=True)
    print(f"\nlargest error: {100 * worst:.0f} %")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["forecast", "table", "check"])
    p.add_argument("problem", nargs="?", choices=PROBLEMS)
    p.add_argument("--out", type=Path, required=True, help="where the figures lie")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    p.add_argument("--network", choices=["infiniband", "ethernet"], default="infiniband")
    args = p.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    said = io.StringIO()
    with contextlib.redirect_stdout(said) if args.what == "table" else contextlib.nullcontext():
        {"forecast": forecast, "table": table, "check": check}[args.what](args)
    if args.what == "table":
        (args.out / "tables.md").write_text(said.getvalue())
        print(said.getvalue())


if __name__ == "__main__":
    main()
