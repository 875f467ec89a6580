"""What an estimate with as many queries as parameters consists of, as the paper's Table A1 takes it apart."""

import argparse

import numpy as np
import torch

from dzhpc.engines import make_engine
from dzhpc.files.benched import stages_table
from dzhpc.method.estimators import cge, directions, rge_slopes, rge_sum
from dzhpc.training.benchmark import choose, problem, timed

PARTS = ("direction vectors", "weight perturbation", "model inference", "other arithmetic")


def stages(args: argparse.Namespace) -> tuple[dict[str, object], str]:
    """Seconds of d queries by RGE and CGE, engine full, part by part, and of CGE by engine delta; from ``args.queries`` of them.

    Each is the least of the repeats, since parts are differences. Directions, forward passes and the sum are timed alone; the
    perturbation is what is left, and holds the return to the base:
    weights, buffers, random state. RGE's sum makes its directions anew, since between ranks only numbers travel.
    """
    device = choose(args)
    model, inputs, labels = problem(args, device)
    engine, fast = make_engine("full", model, "cross_entropy"), make_engine("delta", model, "cross_entropy")
    size, n = engine.index.size, min(args.queries, engine.index.size)
    coords = np.arange(size)
    some = np.linspace(0, size - 1, n).astype(np.int64)
    for one in (engine, fast):
        one.bind(inputs, labels)
        one.differences(some, args.mu)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def forward() -> None:
        for _ in range(n):
            torch.nn.functional.cross_entropy(model(inputs), labels)

    slopes = rge_slopes(engine, range(n), args.mu, args.seed, coords)
    work = {
        "vectors": lambda: [None for _ in directions(engine.index, range(n), args.seed, coords)],
        "forward": forward,
        "slopes": lambda: rge_slopes(engine, range(n), args.mu, args.seed, coords),
        "sum": lambda: rge_sum(slopes, args.seed, coords, engine.index),
        "cge": lambda: cge(engine, some, args.mu),
        "delta": lambda: cge(fast, coords, args.mu),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(args.repeats):
        for name, do in work.items():
            seconds[name].append(timed(device, do))
    model.load_state_dict(before)
    took = {name: min(values) * (1 if name == "delta" else size / n) for name, values in seconds.items()}
    rows = [
        _row("rge, q = d", "full", took["slopes"] + took["sum"], took["vectors"], took["forward"], took["sum"]),
        _row("cge", "full", took["cge"], 0.0, took["forward"], 0.0),
        {"estimate": "cge", "engine": "delta", "parts": None, "seconds": took["delta"]},
    ]
    head = (
        f"{args.model}, {size} parameters, batch {args.batch}, {device}, {args.threads} thread(s); "
        f"seconds an estimate, from {n} queries, the least of {args.repeats}"
    )
    found = {"parameters": size, "rows": rows}
    return found, f"{head}\n\n{stages_table([found])}"


def _row(estimate: str, engine: str, total: float, vectors: float, forward: float, other: float) -> dict:
    parts = [vectors, total - vectors - forward - other, forward, other]
    return {"estimate": estimate, "engine": engine, "parts": dict(zip(PARTS, parts, strict=True)), "seconds": total}
