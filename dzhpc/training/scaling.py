"""What a training step takes on 1, 2, 4, ... ranks, and how much of it is communication: short runs by mpirun."""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from dzhpc import config as configuration
from dzhpc.engines.pinned import Pinned
from dzhpc.errors import InputError
from dzhpc.files.metrics import load_columns
from dzhpc.job import device as devices
from dzhpc.tasks import make_task
from dzhpc.training.forecast import Forecast
from dzhpc.training.stepmodel import ETHERNET, INFINIBAND

LIMIT_S = 3600  # for one training run


def scaling(args: argparse.Namespace) -> tuple[dict[str, list[dict]], str]:
    """Seconds a step, and the share of communication, of short training runs. Raises InputError if a run fails."""
    numbers = args.ranks.split(",")
    counts = [int(n) for n in numbers if n.strip().isdecimal()]
    if len(counts) < len(numbers) or min(counts) < 1 or args.steps < 2:
        raise InputError("--ranks: expected numbers such as 1,2,4; --steps: at least 2")
    configuration.load(args.input, args.set)  # what is wrong with it is said at once
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
    found = _forecast(args)
    for row in rows:
        row["forecast_s"] = found.model.step(row["ranks"], found.given).seconds
    lines = ["| ranks | s a step: median (min to max) | forecast | speed-up | communication |", "|---" * 5 + "|"]
    for r in rows:
        spread = f"{r['step_s']:.3g} ({r['step_min']:.3g} to {r['step_max']:.3g})"
        off = f"{r['forecast_s']:.3g} ({100 * (r['forecast_s'] / r['step_s'] - 1):+.0f} %)"
        lines.append(f"| {r['ranks']} | {spread} | {off} | {r['speedup']:.2f} | {100 * r['communication']:.1f} % |")
    head = f"{args.input} {' '.join(args.set)}, {args.steps} steps each"
    if args.plot:
        found.plot(args.plot)
    return {"rows": rows}, "\n".join([head, "", *lines, "", f"forecast; network {found.model.network.name}", "", *found.table()])


def _forecast(args: argparse.Namespace) -> Forecast:
    config = configuration.load(args.input, args.set)
    task = make_task(config, devices.choose(0, config.run.threads))
    with Pinned(task.model, task.engine.index.device).unchanged():
        task.bind(0)
    return Forecast(task, {"infiniband": INFINIBAND, "ethernet": ETHERNET}[args.network])


def _train(launch: list[str], folder: str, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """(step_s, comm_s) of the steps after the first."""
    sets = [f"--set={text}" for text in [*args.set, f"stop.steps={args.steps}"]]
    command = [*launch, sys.executable, "-m", "dzhpc.train", args.input, "--run-dir", f"{folder}/run", "--quiet", *sets]
    try:
        with open(f"{folder}/log", "w") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT_S, check=False).returncode
    except subprocess.TimeoutExpired:
        raise InputError(f"{' '.join(launch)} took more than {LIMIT_S} s; ask for fewer --steps, or a smaller problem") from None
    if code:
        text = re.sub(r"\x1b\[[0-9;]*m", "", Path(f"{folder}/log").read_text(encoding="utf-8", errors="replace"))
        raise InputError(
            f"{' '.join(launch)} ended with exit code {code}: {text.strip().splitlines()[-1] if text.strip() else ''}"
        )
    train, _ = load_columns(f"{folder}/run/metrics.h5")
    return train["step_s"][1:], train["comm_s"][1:]
