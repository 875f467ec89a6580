"""Verb: engines side by side on the same coordinates, and a training step on 1, 2, 4, ... ranks.

``python -m dzhpc.bench gradient --model resnet20 --batch 128`` · ``python -m dzhpc.bench scaling inputs/digits.toml --ranks 1,2``
"""

import argparse
import copy
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dzhpc.config import Model
from dzhpc.engines import make_engine
from dzhpc.errors import InputError
from dzhpc.files import store
from dzhpc.job import device as devices
from dzhpc.job import processor
from dzhpc.job.launch import run_verb
from dzhpc.job.world import World
from dzhpc.method import scores as pruning
from dzhpc.method.seeds import generator
from dzhpc.models import zoo as models

LIMIT_S = 3600  # for one training run of ``scaling``


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("dzhpc.bench", description="What a gradient costs, and how a step scales over ranks.")
    kinds = p.add_subparsers(dest="kind", required=True)
    g = kinds.add_parser("gradient", help="engines side by side: time, memory, and error against float64")
    g.add_argument("--model", default="resnet20", help="resnet20, resnet56, resnet18, vit-tiny, or cnn:DEPTH")
    g.add_argument("--weights", help="start from this file (a checkpoint or a torch state_dict); else random weights")
    g.add_argument("--batch", type=int, default=128, help="images of 32 x 32 random pixels")
    g.add_argument("--coords", type=int, default=200, help="how many of the coordinates drawn by the LPR over the whole network")
    g.add_argument("--reference", type=int, default=200, help="compare with float64 on so many of them")
    g.add_argument("--ratio", type=float, default=0.9, help="sparsity of the LPR (first-order GraSP on this batch)")
    g.add_argument("--mu", type=float, default=5e-3, help="smoothing parameter")
    g.add_argument("--engines", default="full,reuse,delta")
    g.add_argument("--precisions", default="fp32,bf16", help="of engine delta; the others have fp32 only")
    g.add_argument("--memory-mb", type=float, help="zo.memory_mb of engine delta")
    g.add_argument("--threads", type=int, default=1)
    g.add_argument("--repeats", type=int, default=5, help="interleaved repetitions")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    g.add_argument("--json", type=Path, help="write the figures here")
    s = kinds.add_parser("scaling", help="seconds a training step on several numbers of ranks")
    s.add_argument("input", help="TOML input file")
    s.add_argument("--ranks", default="1,2", help="numbers of ranks")
    s.add_argument("--steps", type=int, default=5, help="steps of each run; the first, which compiles, does not count")
    s.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; may be repeated")
    s.add_argument("--json", type=Path, help="write the figures here")
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb (on one rank: ``scaling`` starts its own); the exit code."""
    if world.size > 1:
        raise InputError("dzhpc.bench: start it without mpirun; `scaling` starts the ranks itself")
    rows, text = (gradient if args.kind == "gradient" else scaling)(args)
    print(text)
    if args.json:
        options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        args.json.write_text(json.dumps({"options": options, "machine": machine(), "rows": rows}, indent=1) + "\n")
    return 0


def machine() -> dict[str, str]:
    """Hardware and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    cpu = torch.cpu.get_capabilities()
    return {
        "cpu": f"{cpu.get('cpu_name') or platform.processor()}, {cpu.get('num_physical_cores')} cores",
        "instruction set": processor.instruction_set(),
        "bf16 on the cpu": str(devices.has_fast_bf16(torch.device("cpu"))),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


# --- gradient --------------------------------------------------------------------------------------------------------------


def gradient(args: argparse.Namespace) -> tuple[list[dict], str]:
    """Milliseconds a query, memory, and error of each engine. Raises InputError for a model or engine that is not known."""
    device = _device(args)
    model, inputs, labels = problem(args, device)
    coords = coordinates(model, inputs, labels, args)
    kinds = [(e, p) for e in args.engines.split(",") for p in (args.precisions.split(",") if e == "delta" else ["fp32"])]
    engines, bases = {}, {}
    for kind, precision in kinds:
        limit = args.memory_mb if kind == "delta" else None
        engine = engines[kind, precision] = make_engine(kind, model, "cross_entropy", precision, limit)
        bases[kind, precision] = _timed(device, lambda e=engine: e.bind(inputs, labels))
        first = _timed(device, lambda e=engine: e.differences(coords, args.mu))
        print(f"{kind} {precision}: first gradient, compilation included, {first:.1f} s", file=sys.stderr)
    seconds: dict = {kind: [] for kind in engines}
    peaks = dict.fromkeys(engines, 0)
    for _ in range(args.repeats):
        for kind, engine in engines.items():
            with devices.PeakMemory(device) as memory:
                seconds[kind].append(_timed(device, lambda e=engine: e.differences(coords, args.mu)))
            peaks[kind] = max(peaks[kind], memory.bytes)
    some = _part(len(coords), args.reference, args.seed, "reference")
    truth = _truth(model, inputs, labels, coords[some], args.mu)
    rows = []
    for (kind, precision), engine in engines.items():
        ms = 1e3 * np.array(seconds[kind, precision]) / len(coords)
        error = (engine.differences(coords[some], args.mu).double().cpu() - truth).norm() / truth.norm()
        ratio = np.median(np.array(seconds["reuse", "fp32"]) / seconds[kind, precision]) if ("reuse", "fp32") in seconds else None
        rows.append(
            {
                "engine": kind,
                "precision": precision,
                "ms_per_query": float(np.median(ms)),
                "ms_min": float(ms.min()),
                "ms_max": float(ms.max()),
                "queries_per_s": float(1e3 / np.median(ms)),
                "peak_mib": peaks[kind, precision] / 2**20,
                "kept_mib": engine.peak_bytes / 2**20,
                "bind_s": bases[kind, precision],
                "relative_error": float(error),
                "times_reuse": None if ratio is None else float(ratio),
            }
        )
    head = (
        f"{args.model}, batch {args.batch}, {len(coords)} coordinates by LPR at {args.ratio:g} sparsity, mu {args.mu:g}, "
        f"{device}, {args.threads} thread(s), {args.repeats} interleaved repetitions; error against float64 on {len(some)}"
    )
    return rows, f"{head}\n\n{_gradient_table(rows)}"


def _gradient_table(rows: list[dict]) -> str:
    lines = [
        "| engine | precision | ms a query: median (min to max) | queries/s | peak MiB | error | times reuse |",
        "|---" * 7 + "|",
    ]
    for r in rows:
        ratio = "" if r["times_reuse"] is None else f"{r['times_reuse']:.2f}"
        spread = f"{r['ms_per_query']:.3g} ({r['ms_min']:.3g} to {r['ms_max']:.3g})"
        cells = [r["engine"], r["precision"], spread, f"{r['queries_per_s']:.4g}", f"{r['peak_mib']:.0f}"]
        lines.append("| " + " | ".join([*cells, f"{r['relative_error']:.1e}", ratio]) + " |")
    return "\n".join(lines)


def _device(args: argparse.Namespace) -> torch.device:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device here")
    if min(args.batch, args.coords, args.reference, args.repeats, args.threads) < 1:
        raise InputError("--batch, --coords, --reference, --repeats and --threads must be at least 1")
    return devices.choose(0, args.threads) if args.device == "cuda" else devices.cpu(args.threads)


def problem(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The network and a batch of random images and labels."""
    name, _, depth = args.model.partition(":")
    section = Model(name=name, weights=args.weights, **({"depth": int(depth)} if depth.isdigit() else {}))
    model = models.build(section, args.seed).to(device, memory_format=torch.channels_last).train()
    random = generator(args.seed, "bench")
    inputs = torch.randn(args.batch, 3, 32, 32, generator=random).to(device, memory_format=torch.channels_last)
    return model, inputs, torch.randint(0, 10, (args.batch,), generator=random).to(device)


def coordinates(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace) -> np.ndarray:
    """A random part of the S that first-order GraSP's ratios give on this batch; sorted."""
    engine = make_engine("full", model, "cross_entropy")
    layers = pruning.prunable_layers(model, engine.index)
    scores = pruning.fo_grasp(engine, lambda: engine.bind(inputs, labels))
    active = pruning.draw(
        pruning.lpr_from_scores(scores, engine.index, layers, args.ratio, "signed", ""), engine.index, args.seed, 0
    )
    return active[_part(len(active), args.coords, args.seed, "coordinates")]


def _part(n: int, count: int, seed: int, purpose: str) -> np.ndarray:
    """``count`` of n positions at random, sorted."""
    return np.sort(torch.randperm(n, generator=generator(seed, purpose))[:count].numpy())


def _truth(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, coords: np.ndarray, mu: float) -> torch.Tensor:
    """The same differences by engine full in float64."""
    engine = make_engine("full", copy.deepcopy(model).double(), "cross_entropy")
    engine.bind(inputs.double(), labels)
    return engine.differences(coords, mu).cpu()


def _timed(device: torch.device, work) -> float:
    devices.synchronize(device)
    start = time.perf_counter()
    work()
    devices.synchronize(device)
    return time.perf_counter() - start


# --- scaling ---------------------------------------------------------------------------------------------------------------


def scaling(args: argparse.Namespace) -> tuple[list[dict], str]:
    """Seconds a step, and the share of communication, of short training runs. Raises InputError if a run fails."""
    counts = [int(n) for n in args.ranks.split(",") if n.isdigit()]
    if not counts or args.steps < 2:
        raise InputError("--ranks: expected numbers such as 1,2,4; --steps: at least 2")
    mpirun = next((str(p) for p in [Path(sys.executable).parent / "mpirun"] if p.exists()), None) or shutil.which("mpirun")
    if mpirun is None:
        raise InputError("mpirun was not found beside python or on the PATH")
    rows = []
    for n in counts:
        with tempfile.TemporaryDirectory() as folder:
            step_s, comm_s = _train([mpirun, "-n", str(n)], folder, args)
        rows.append(
            {
                "ranks": n,
                "step_s": float(np.median(step_s)),
                "step_min": float(step_s.min()),
                "step_max": float(step_s.max()),
                "communication": float(comm_s.sum() / step_s.sum()),
                "speedup": rows[0]["step_s"] * rows[0]["ranks"] / float(np.median(step_s)) if rows else float(n),
            }
        )
    lines = ["| ranks | s a step: median (min to max) | speed-up | communication |", "|---" * 4 + "|"]
    for r in rows:
        spread = f"{r['step_s']:.3g} ({r['step_min']:.3g} to {r['step_max']:.3g})"
        lines.append(f"| {r['ranks']} | {spread} | {r['speedup']:.2f} | {100 * r['communication']:.1f} % |")
    return rows, "\n".join([f"{args.input} {' '.join(args.set)}, {args.steps} steps each", "", *lines])


def _train(launch: list[str], folder: str, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """(step_s, comm_s) of the steps after the first."""
    sets = [f"--set={text}" for text in [*args.set, f"stop.steps={args.steps}"]]
    command = [*launch, sys.executable, "-m", "dzhpc.train", args.input, "--run-dir", f"{folder}/run", "--quiet", *sets]
    with open(f"{folder}/log", "w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT_S, check=False).returncode
    if code:
        text = re.sub(r"\x1b\[[0-9;]*m", "", Path(f"{folder}/log").read_text())
        raise InputError(
            f"{' '.join(launch)} ended with exit code {code}: {text.strip().splitlines()[-1] if text.strip() else ''}"
        )
    train, _ = store.load_metrics(f"{folder}/run/metrics.h5")
    columns = dict(zip(store.TRAIN_COLUMNS, train.T, strict=True))
    return columns["step_s"][1:], columns["comm_s"][1:]


if __name__ == "__main__":
    run_verb(parser(), main, parallel=False)
