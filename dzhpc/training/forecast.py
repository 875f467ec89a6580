"""What a run would cost: queries, hours on 1, 2, 4, ... ranks, and memory, from a few timed chunks."""

import time

import numpy as np

from dzhpc.engines.pinned import Pinned
from dzhpc.job import device as devices
from dzhpc.job.log import duration
from dzhpc.method.coordinates import balance
from dzhpc.method.estimators import make_estimator
from dzhpc.method.gauss_newton import TRIES
from dzhpc.method.scores import draw, lpr_from_scores, random_scores
from dzhpc.training import gauss_newton
from dzhpc.training.active_set import Pattern
from dzhpc.training.budget import Budget

CHUNKS = 12  # timed, spread evenly over the network


def forecast(task) -> str:
    """The resolved input and the forecast, as text. Nothing is written and no state is kept.

    Layers are taken at the mean ratio, since the true layer-wise ratios cost queries; the total |S| is the same up to rounding.
    """
    config, engine, index = task.config, task.engine, task.engine.index
    coords = mean_pattern(task)
    sides = 2 if config.zo.difference == "central" else 1
    estimator, pattern = make_estimator(config.zo, config.run.seed), Pattern(task, None)
    budget = Budget(task, estimator, pattern)
    per_step, steps, scores = budget.of_step(len(coords)), budget.last_step, pattern.ahead(0)[0]
    interval = config.eval.every_epochs * task.steps_per_epoch
    evaluations = -(-steps // interval) * task.cost.evaluation
    total = per_step * steps + scores + evaluations
    trials = f" and 1 to {TRIES} of {task.cost.query:,} for trials" if config.optim.tries else ""
    base_s, cost = _timed(task, coords)
    newton = gauss_newton.forecast(task, len(coords)) if config.optim.name == "gauss-newton" else None
    lines = [
        config.to_toml(),
        f"coordinates {index.size:,}, active |S| {len(coords):,}, steps {steps:,} of {task.steps_per_epoch} an epoch",
        f"queries: {per_step:,} a step{trials}, {scores:,} for scores, {evaluations:,} for evaluations, {total:,} in all",
        f"memory: parameters {index.size * index.parameters[0].element_size() / 2**20:.1f} MiB, "
        f"kept features {engine.peak_bytes / 2**20:.1f} MiB, process {_resident_mib():.0f} MiB a rank",
        engine.explain(),
        f"timed: base pass {1e3 * base_s:.1f} ms, {1e3 * cost.sum() / max(1, len(coords)):.2f} ms a query",
    ]
    if newton:
        lines.append(newton.text)
    if estimator.by_coordinate:
        for ranks in (1, 2, 4, 8, 16, 32, 64):
            slowest = max(sum(cost[k] for k in part) for part in balance(list(cost), ranks))
            step_s = base_s + slowest * sides + (newton.seconds(ranks) if newton else 0)
            lines.append(f"{ranks:3d} ranks: {duration(step_s * steps):>11}, {step_s:8.2f} s a step")
    without = "scores and evaluation" if newton else "scores, evaluation and communication"
    lines.append(f"without {without}; true ratios often keep more of the early, dearer layers")
    return "\n".join(lines)


def mean_pattern(task) -> np.ndarray:
    """An S with as many coordinates of each layer as the mean ratio leaves; without a query."""
    config, index = task.config.sparsity, task.engine.index
    if config.ratio == 0:
        return np.arange(index.size)
    lpr = lpr_from_scores(random_scores(index, 0), index, task.prunable(), config.ratio, "signed", "")
    return draw(lpr, index, task.config.run.seed, 0)


def _timed(task, coords: np.ndarray) -> tuple[float, np.ndarray]:
    """(seconds of a base pass, estimated seconds of each chunk)."""
    engine = task.engine
    with Pinned(task.model, task.engine.index.device).unchanged():
        task.bind(0)  # warm-up: tracing, caches
        start = time.perf_counter()
        task.bind(0)
        base_s = time.perf_counter() - start
        chunks = engine.cut(coords)
        picked = sorted({int(k) for k in np.linspace(0, len(chunks) - 1, CHUNKS)})
        per_coordinate = []
        for k in picked:
            part = coords[chunks[k].start : chunks[k].stop]
            engine.differences(part[:1], task.config.zo.mu)  # compiles what has to be compiled
            devices.synchronize(engine.index.device)
            start = time.perf_counter()
            engine.differences(part, task.config.zo.mu)
            devices.synchronize(engine.index.device)
            per_coordinate.append((time.perf_counter() - start) / len(part))
    cost = np.interp(range(len(chunks)), picked, per_coordinate) * [len(chunk) for chunk in chunks]
    return base_s, cost


def _resident_mib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
