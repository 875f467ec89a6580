"""What a gradient of the unrolled loss costs: engines side by side, share of network and solver, memory, cosine to autograd.

    python -m dzhpc.simulate inputs/sol.toml -o data/wake.h5
    python benchmarks/sol_gradient.py --root data

Networks of --cases are WIDTHS:UNROLL:RATIO, as 8:8:0 (all 1,010 coordinates) and 32,64:16:0.95 (the paper's 2,845). Of each
parameter's active coordinates at most --chunks chunks are evaluated, and their seconds are extrapolated to the others. Engines
take turns (engine full with --full coordinates only); the least of --repeats counts. Shares are those of another pass, timed call
by call. Memory: on a CPU what the engine keeps and a chunk needs at most, by its own count; on a GPU the peak. The weights of
the last layer are N(0, 0.01^2), for at zero the others have no gradient; or --weights of a run, where cosines are worse: near a
minimum the gradient is small and mu / 2 times the curvature is not.
"""

import argparse
import itertools
import platform
import time

import numpy as np
import torch
from torch import nn

import dzhpc
from dzhpc import config as configuration
from dzhpc.job import device as devices
from dzhpc.tasks import make_task
from dzhpc.tasks.sol.task import SolTask
from dzhpc.training import forecast


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", required=True, help="the folder that holds NAME.h5")
    p.add_argument("--name", default="wake")
    p.add_argument("--cases", nargs="+", default=["8:8:0", "32,64:16:0.95"], metavar="WIDTHS:UNROLL:RATIO")
    p.add_argument("--engines", nargs="+", default=["delta", "full"])
    p.add_argument("--weights", metavar="RUN", help="a run folder or checkpoint of the network of the one case")
    p.add_argument("--batch", type=int, default=3, help="windows")
    p.add_argument("--mu", type=float, nargs="+", default=[1e-3, 1e-5], help="for the cosine; the first for the times")
    p.add_argument("--chunks", type=int, default=1000, help="of a parameter, at most")
    p.add_argument("--full", type=int, default=24, help="coordinates for engine full, evenly spaced among the others")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return p


def task_of(args: argparse.Namespace, case: str, engine: str, device: torch.device) -> SolTask:
    """A bound task whose network corrects a little."""
    widths, unroll, ratio = case.split(":")
    keys = (
        "task.kind=sol",
        f"task.unroll={unroll}",
        "model.name=corrector",
        f"model.widths=[{widths}]",
        f"data.root={args.root}",
    )
    data = (f"data.name={args.name}", f"data.batch_size={args.batch}", f"sparsity.ratio={float(ratio)}", "sparsity.prune=all")
    task = make_task(configuration.load(None, [*keys, *data, f"zo.engine={engine}"]), device)
    last = [m for m in task.model.modules() if isinstance(m, nn.Conv2d)][-1]
    if not args.weights:
        with torch.no_grad():
            last.weight.copy_(0.01 * torch.randn(last.weight.shape, generator=torch.Generator().manual_seed(0)))
    task.bind(0)
    return task


def chosen(task: SolTask, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """(coordinates [n], how many active ones each stands for [n])."""
    active, index = forecast.mean_pattern(task), task.engine.index
    cut = [active[chunk.start : chunk.stop] for chunk in task.engine.cut(active)]
    coords, weights = [], []
    for _, of_one in itertools.groupby(cut, lambda chunk: index.owner(chunk[:1])[0]):
        of_one = list(of_one)
        coords += of_one[:chunks]
        taken = sum(map(len, of_one[:chunks]))
        weights += [np.full(taken, sum(map(len, of_one)) / taken)]
    return np.concatenate(coords), np.concatenate(weights)


def seconds(task: SolTask, coords: np.ndarray, weights: np.ndarray, mu: float) -> float:
    """Of a gradient: each chunk's time, times what it stands for."""
    total = 0.0
    for chunk in task.engine.cut(coords):
        start = time.perf_counter()
        task.engine.differences(coords[chunk.start : chunk.stop], mu)
        devices.synchronize(task.engine.index.device)
        total += (time.perf_counter() - start) * weights[chunk.start]
    return total


def shares(task: SolTask, coords: np.ndarray, mu: float) -> tuple[float, float, float]:
    """(share of the network, share of the solver, FLOP/s of the network), what perturbs it counted in."""
    device, spent, flop = task.engine.index.device, {"network": 0.0, "solver": 0.0}, 0

    def timed(name: str, call):
        def wrapped(*args):
            devices.synchronize(device)
            start = time.perf_counter()
            found = call(*args)
            devices.synchronize(device)
            spent[name] += time.perf_counter() - start
            return found

        return wrapped

    def count(module: nn.Conv2d, inputs: tuple, outputs: torch.Tensor) -> None:
        nonlocal flop
        flop += 2 * outputs.numel() * module.weight[0].numel()

    convolutions = [m for m in task.model.modules() if isinstance(m, nn.Conv2d)]
    hooks = [m.register_forward_hook(count) for m in convolutions]
    forward, simulator = task.model.forward, task.engine.loss.simulator
    task.model.forward, task.engine.loss.simulator = timed("network", forward), timed("solver", simulator)
    start = time.perf_counter()
    task.engine.differences(coords, mu)
    devices.synchronize(device)
    whole = time.perf_counter() - start
    task.model.forward, task.engine.loss.simulator = forward, simulator
    for hook in hooks:
        hook.remove()
    return spent["network"] / whole, spent["solver"] / whole, flop / spent["network"]


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    device = devices.choose(0, 1) if args.device == "cuda" else devices.cpu(1)
    print(f"{devices.describe(device)}, {platform.machine()}, torch {torch.__version__}, batch {args.batch}\n")
    cosines = " | ".join(f"cosine, mu = {mu:g}" for mu in args.mu)
    print("| network | unroll | engine | coordinates | measured | s a gradient | ms a sample-step | network | solver | GFLOP/s | "
          f"peak MiB | {cosines} |")  # fmt: skip
    print("|---" * (11 + len(args.mu)) + "|")
    for case in args.cases:
        tasks = {engine: task_of(args, case, engine, device) for engine in args.engines}
        plans = {engine: chosen(task, args.chunks) for engine, task in tasks.items()}
        if {"delta", "full"} <= set(plans):
            coords, weights = plans["delta"]
            picked = np.linspace(0, len(coords) - 1, min(args.full, len(coords))).astype(int)
            plans["full"] = coords[picked], np.full(len(picked), weights.sum() / len(picked))
        best, memory = dict.fromkeys(tasks, np.inf), dict.fromkeys(tasks, 0)
        for _ in range(args.repeats):
            for engine, task in tasks.items():
                if args.device == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                best[engine] = min(best[engine], seconds(task, *plans[engine], args.mu[0]))
                memory[engine] = devices.peak_bytes(device, task.engine.peak_bytes)
        for engine, task in tasks.items():
            print(row(args, case, engine, task, plans[engine], best[engine], memory[engine]), flush=True)


def row(args: argparse.Namespace, case: str, engine: str, task: SolTask, plan: tuple, best: float, memory: int) -> str:
    """A line of the table."""
    (coords, weights), (widths, unroll, _) = plan, case.split(":")
    exact = task.engine.index.flatten(task.engine.gradient())[torch.from_numpy(coords).to(task.engine.index.device)]
    cosines = [float(torch.cosine_similarity(dzhpc.cge(task.engine, coords, mu), exact, dim=0)) for mu in args.mu]
    network, solver, rate = shares(task, coords, args.mu[0])
    count = round(weights.sum())
    each = best / (count * args.batch * int(unroll))
    return (
        f"| {widths} | {unroll} | {engine} | {count:,} | {len(coords):,} | {best:.3g} | {1e3 * each:.3g} | {100 * network:.0f} % "
        f"| {100 * solver:.0f} % | {rate / 1e9:.0f} | {memory / 2**20:.0f} | {' | '.join(f'{c:.6f}' for c in cosines)} |"
    )


if __name__ == "__main__":
    main(parser().parse_args())
