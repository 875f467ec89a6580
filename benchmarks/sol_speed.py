"""Sample-steps per second of PhiFlow (jit-compiled) and of ``projected``: ``python benchmarks/sol_speed.py``

Both advance the same states, in turn and in one process, on as many threads. The states are the wake at rest with large vortices
stirred in, 50 steps later, each another one: what CG has to do depends on them. Memory is the growth of the peak of the resident
size from before the first call of a batch, each in a process of its own.
"""

import argparse
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

from dzhpc.job.device import PeakMemory
from dzhpc.tasks.sol.simulators import make_wake
from dzhpc.tasks.sol.wake import Wake, pack

NAMES = ("phiflow", "projected")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--resolution", type=int, default=32)
    p.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128, 512])
    p.add_argument("--repeats", type=int, default=15)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--memory", nargs=2, metavar=("NAME", "BATCH"), help="print the bytes of this one and leave")
    return p


def stirred(wake: Wake, count: int, steps: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """States [count, ...], no two alike, and their parameters [count]."""
    draw, (nx, ny) = torch.Generator().manual_seed(0), wake.cells
    stream = wake.resolution / 16 * torch.randn(count, 1, 6, 12, generator=draw)
    stream = F.interpolate(stream, (nx + 1, ny + 1), mode="bicubic", align_corners=True)[:, 0]
    states = wake.initial() + pack(stream[..., 1:] - stream[..., :-1], stream[:, :-1] - stream[:, 1:])
    parameters = 160e3 * 2 ** torch.linspace(0, 5, count, dtype=torch.float64)
    solver = make_wake("projected", wake, torch.device("cpu"))
    for _ in range(steps):
        states = solver(states, parameters)
    return states, parameters


def seconds(solvers: list, states: torch.Tensor, parameters: torch.Tensor, repeats: int) -> np.ndarray:
    """Of single steps [solvers, repeats], the solvers in turn, after two steps each that compile."""
    found = np.zeros((len(solvers), repeats))
    for k in range(-2, repeats):
        for row, solver in zip(found, solvers, strict=True):
            start = time.perf_counter()
            solver(states, parameters)
            if k >= 0:
                row[k] = time.perf_counter() - start
    return found


def memory(args: argparse.Namespace, name: str, batch: int) -> float:
    """MiB, from another process."""
    keys = ["--resolution", args.resolution, "--threads", args.threads, "--memory", name, batch]
    done = subprocess.run([sys.executable, __file__, *map(str, keys)], capture_output=True, text=True, check=True, timeout=600)
    return int(done.stdout.split()[-1]) / 2**20


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    """Print a table."""
    torch.set_num_threads(args.threads)
    wake, cpu = Wake(args.resolution), torch.device("cpu")
    if args.memory:
        solver, (states, parameters) = make_wake(args.memory[0], wake, cpu), stirred(wake, int(args.memory[1]), steps=0)
        with PeakMemory(cpu) as peak:
            seconds([solver], states, parameters, 1)
        print(peak.bytes)
        return
    solvers = [make_wake(name, wake, cpu) for name in NAMES]
    print(f"{wake.cells[0]} x {wake.cells[1]} cells, {args.threads} thread(s), median of {args.repeats} steps (least - most)\n")
    print(" | ".join(["| batch", *(f"{name}, {what}" for what in ("ms", "steps/s", "MiB") for name in NAMES), "ratio |"]))
    print("|---" * 8 + "|")
    for batch in args.batches:
        found = seconds(solvers, *stirred(wake, batch), args.repeats)
        median = np.median(found, axis=1)
        cells = [f"{1e3 * m:.2f} ({1e3 * t.min():.2f} - {1e3 * t.max():.2f})" for m, t in zip(median, found, strict=True)]
        cells += [f"{batch / m:,.0f}" for m in median]
        cells += [f"{memory(args, name, batch):.0f}" for name in NAMES] + [f"{median[0] / median[1]:.1f}"]
        print(f"| {batch} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(parser().parse_args())
