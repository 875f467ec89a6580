"""What a gradient costs: engines side by side on the same coordinates, with their errors against float64."""

import argparse
import copy
import platform
import time

import numpy as np
import torch
from torch import nn

from dzhpc.config import Model, Zo
from dzhpc.engines import make_engine
from dzhpc.errors import InputError
from dzhpc.job import device as devices
from dzhpc.job import processor
from dzhpc.job.failure import say_error
from dzhpc.method import scores
from dzhpc.method.estimators import make_estimator
from dzhpc.method.seeds import generator
from dzhpc.models import zoo
from dzhpc.tasks import fitting


def machine() -> dict[str, str]:
    """Hardware and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": f"{processor.name()}, {torch.cpu.get_capabilities().get('num_physical_cores')} cores",
        "instruction set": processor.instruction_set(),
        "bf16 on the cpu": str(devices.has_fast_bf16(torch.device("cpu"))),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def gradient(args: argparse.Namespace) -> tuple[dict[str, list[dict]], str]:
    """Milliseconds a query, memory, and error of each engine; errors of estimators. Raises InputError for what is not known."""
    device = choose(args)
    model, inputs, labels = problem(args, device)
    coords = coordinates(model, inputs, labels, args)
    precisions = args.precisions or ("fp32,bf16" if devices.has_fast_bf16(device) else "fp32")
    kinds = [(e, p) for e in args.engines.split(",") for p in (precisions.split(",") if e == "delta" else ["fp32"])]
    engines, bases = {}, {}
    for kind, precision in kinds:
        limit = args.memory_mb if kind == "delta" else None
        engine = engines[kind, precision] = make_engine(kind, model, "cross_entropy", precision, limit)
        bases[kind, precision] = timed(device, lambda e=engine: e.bind(inputs, labels))
        first = timed(device, lambda e=engine: e.differences(coords, args.mu))
        say_error(f"{kind} {precision}: first gradient, compilation included, {first:.1f} s")
    seconds: dict = {kind: [] for kind in engines}
    peaks = dict.fromkeys(engines, 0)
    for _ in range(args.repeats):
        for kind, engine in engines.items():
            with devices.PeakMemory(device) as memory:
                seconds[kind].append(timed(device, lambda e=engine: e.differences(coords, args.mu)))
            peaks[kind] = max(peaks[kind], memory.bytes)
    some = _part(len(coords), args.reference, args.seed, "reference")
    truth = _truth(model, inputs, labels, coords[some], args.mu)
    reuse = seconds.get(("reuse", "fp32"))
    rows = []
    for (kind, precision), engine in engines.items():
        ms = 1e3 * np.array(seconds[kind, precision]) / len(coords)
        error = (engine.differences(coords[some], args.mu).double().cpu() - truth).norm() / truth.norm()
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
                "times_reuse": float(np.median(np.array(reuse) / seconds[kind, precision])) if reuse else None,
            }
        )
    head = (
        f"{args.model}, batch {args.batch}, {len(coords)} coordinates by LPR at {args.ratio:g} sparsity, mu {args.mu:g}, "
        f"{device}, {args.threads} thread(s), {args.repeats} interleaved repetitions; error against float64 on {len(some)}"
    )
    found = estimates(model, inputs, labels, coords, args)
    return {"rows": rows, "estimators": found}, f"{head}\n\n{_gradient_table(rows)}\n\n{_estimators_table(found)}"


def estimates(
    model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, coords: np.ndarray, args: argparse.Namespace
) -> list[dict]:
    """How far estimates on ``coords`` [n] are from autograd's gradient g there: |ghat - g| / |g|, and the cosine to it.

    CGE; and RGE beside FG-W, which has the same directions and exact slopes: what RGE would be without differences. Theory says
    that the error is then sqrt((n + 1) / q) in the mean square.
    """
    engine, best = make_engine("full", model, "cross_entropy"), make_engine("delta", model, "cross_entropy")
    for one in (engine, best):
        one.bind(inputs, labels)
    exact = engine.index.flatten(engine.gradient())[torch.from_numpy(coords).to(engine.index.device)].double()
    rows = []
    for name in ("cge", "rge", "fg-w"):
        estimator = make_estimator(Zo(estimator=name, mu=args.mu, q=args.directions), args.seed)
        units = estimator.units(len(coords))
        values = estimator.evaluate(best if name == "cge" else engine, coords, 0, range(units))
        found = estimator.combine(engine, coords, 0, values).double()
        rows.append(
            {
                "estimator": name,
                "queries": estimator.perturbations(len(coords)),
                "relative_error": float((found - exact).norm() / exact.norm()),
                "cosine": float(torch.cosine_similarity(found, exact, dim=0)),
                "theory": None if name == "cge" else ((len(coords) + 1) / units) ** 0.5,
            }
        )
    return rows


def _estimators_table(rows: list[dict]) -> str:
    lines = ["| estimate on these | queries | error to autograd | in theory, at mu -> 0 | cosine |", "|---" * 5 + "|"]
    for r in rows:
        theory = "0" if r["theory"] is None else f"{r['theory']:.2f}"
        lines.append(f"| {r['estimator']} | {r['queries']} | {r['relative_error']:.2g} | {theory} | {r['cosine']:.4f} |")
    return "\n".join(lines)


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


def choose(args: argparse.Namespace) -> torch.device:
    """The device that is asked for. Raises InputError."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device here")
    return devices.choose(0, args.threads) if args.device == "cuda" else devices.cpu(args.threads)


def problem(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The network and a batch of random images and labels."""
    name, _, depth = args.model.partition(":")
    if depth and not depth.isdecimal():
        raise InputError(f"--model {args.model}: expected NAME or NAME:DEPTH, for example cnn:3")
    section = Model(name=name, weights=args.weights, **({"depth": int(depth)} if depth else {}))
    model = zoo.build(section, args.seed).to(device, memory_format=torch.channels_last).train()
    random = generator(args.seed, "bench")
    inputs = torch.randn(args.batch, 3, 32, 32, generator=random).to(device, memory_format=torch.channels_last)
    fitting.try_out(model, inputs[:2], [len(inputs[:2]), 10], "a logit per class", args.model)
    return model, inputs, torch.randint(0, 10, (args.batch,), generator=random).to(device)


def coordinates(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace) -> np.ndarray:
    """A random part of the S that first-order GraSP's ratios give on this batch; sorted."""
    engine = make_engine("full", model, "cross_entropy")
    layers = scores.prunable_layers(model, engine.index)
    found = scores.fo_grasp(engine, lambda: engine.bind(inputs, labels))
    lpr = scores.lpr_from_scores(found, engine.index, layers, args.ratio, "signed", "")
    active = scores.draw(lpr, engine.index, args.seed, 0)
    return active[_part(len(active), args.coords, args.seed, "coordinates")]


def _part(n: int, count: int, seed: int, purpose: str) -> np.ndarray:
    """``count`` of n positions at random, sorted."""
    return np.sort(torch.randperm(n, generator=generator(seed, purpose))[:count].numpy())


def _truth(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, coords: np.ndarray, mu: float) -> torch.Tensor:
    """The same differences by engine full in float64."""
    engine = make_engine("full", copy.deepcopy(model).double(), "cross_entropy")
    engine.bind(inputs.double(), labels)
    return engine.differences(coords, mu).cpu()


def timed(device: torch.device, work) -> float:
    """Seconds of a call, on a GPU of what it started there, too."""
    devices.synchronize(device)
    start = time.perf_counter()
    work()
    devices.synchronize(device)
    return time.perf_counter() - start
