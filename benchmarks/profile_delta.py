"""Where the time of a gradient by engine ``delta`` goes: FLOPs and bytes a query, against what the machine can do.

``python benchmarks/profile_delta.py --model resnet20 --batch 128 --precision bf16 --device cuda``
For a GPU: on a CPU most convolutions are part of the passes behind them, which ``benchmarks/engines.py`` counts.
Convolutions count 2 k^2 C_in O H W B FLOPs a coordinate (C_in = 1 where a change lives in one channel). The fused passes count
the bytes of the changes that enter them (twice: for the sums and for the rest) and that leave them; base values come on top.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dzhpc.engines import make_engine
from dzhpc.engines.delta.change import Change
from dzhpc.engines.delta.propagation import Propagation
from dzhpc.job import device as devices
from dzhpc.training import benchmark


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", default="resnet20")
    p.add_argument("--weights")
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--coords", type=int, default=2000)
    p.add_argument("--ratio", type=float, default=0.9)
    p.add_argument("--precision", default="bf16")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--json", type=Path, help="write the figures here")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--repeats", type=int, default=3)
    return p


def measured(args: argparse.Namespace) -> tuple[dict, float, int]:
    """({kind of work: [seconds, FLOPs, bytes]}, seconds of the whole, number of coordinates) of the fastest repetition."""
    device = devices.choose(0, args.threads) if args.device == "cuda" else devices.cpu(args.threads)
    model, inputs, labels = benchmark.problem(args, device)
    coords = benchmark.coordinates(model, inputs, labels, args)
    found: dict = {}
    advance = Propagation.advance

    def timed(self, run, changes):
        before = {a: changes[a] for n in run.nodes for a in n.all_input_nodes if isinstance(changes.get(a), Change)}
        seconds = taken(device, lambda: advance(self, run, changes))
        out = [changes[n].data for n in run.nodes if isinstance(changes.get(n), Change)]
        module = self.operations.module(run.nodes[0])
        if isinstance(module, torch.nn.Conv2d) and out:
            one = next(iter(before.values())).channel is not None
            work = 2 * module.weight[0].numel() * out[0].numel() / (module.in_channels if one else 1)
            found_add("convolutions, one channel in" if one else "convolutions", seconds, work, 0)
        else:
            entering = [c.data for c in before.values() if isinstance(c, Change)]
            moved = sum(t.numel() * t.element_size() for t in [*out, *entering, *entering])
            found_add("passes" if run.fused else "linear and views", seconds, 0, moved)

    def found_add(kind: str, seconds: float, work: float, moved: float) -> None:
        row = found.setdefault(kind, [0.0, 0.0, 0.0])
        for k, v in enumerate((seconds, work, moved)):
            row[k] += v

    engine = make_engine("delta", model, "cross_entropy", args.precision)
    engine.bind(inputs, labels)
    engine.differences(coords, 5e-3)
    Propagation.advance = timed
    best: tuple = ({}, np.inf)
    for _ in range(args.repeats):
        found.clear()
        whole = taken(device, lambda: engine.differences(coords, 5e-3))
        if whole < best[1]:
            best = ({k: list(v) for k, v in found.items()}, whole)
    return *best, len(coords)


def machine(precision: str, device: torch.device) -> tuple[float, float]:
    """(FLOP/s of a large matrix product in this precision, bytes/s of a large copy) on the device, or the threads, in use."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    n, size = (8192, 2**28) if device.type == "cuda" else (2048, 2**24)
    a, source = torch.randn(n, n).to(device, dtype), torch.zeros(size, device=device)
    target = torch.empty_like(source)
    flops = [2 * n**3 / taken(device, lambda: a @ a) for _ in range(5)]
    moved = [2 * size * 4 / taken(device, lambda: target.copy_(source)) for _ in range(5)]
    return max(flops), max(moved)


def taken(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds; a GPU is waited for before and after, so that the sum over all work is longer than the whole."""
    devices.synchronize(device)
    start = time.perf_counter()
    work()
    devices.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    arguments = parser().parse_args()
    kinds, total, n = measured(arguments)
    peak, bandwidth = machine(arguments.precision, torch.device(arguments.device))
    print(f"{arguments.model}, batch {arguments.batch}, {n} coordinates, {arguments.precision}, {arguments.device}, "
          f"{arguments.threads} thread(s)")  # fmt: skip
    print(f"machine: {peak / 1e9:.0f} GFLOP/s in a large product, {bandwidth / 1e9:.1f} GB/s in a large copy")
    print(f"whole: {1e3 * total / n:.3f} ms a query\n")
    print("| work | share of the time | ms a query | GFLOP a query | GFLOP/s | MB a query | GB/s |")
    print("|---" * 7 + "|")
    if arguments.json:
        each = {kind: dict(zip(("seconds", "flops", "bytes"), row, strict=True)) for kind, row in kinds.items()}
        figures = {"coordinates": n, "seconds": total, "machine": {"flops_s": peak, "bytes_s": bandwidth}, "work": each}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    kinds["the rest: origins, loss, Python"] = [total - sum(v[0] for v in kinds.values()), 0, 0]
    for kind, (seconds, flops, moved) in sorted(kinds.items(), key=lambda item: -item[1][0]):
        cells = [f"{100 * seconds / total:.0f} %", f"{1e3 * seconds / n:.3f}"]
        cells += [f"{flops / n / 1e9:.3f}", f"{flops / seconds / 1e9:.0f}"] if flops else ["", ""]
        cells += [f"{moved / n / 1e6:.2f}", f"{moved / seconds / 1e9:.1f}"] if moved else ["", ""]
        print("| " + " | ".join([kind, *cells]) + " |")
