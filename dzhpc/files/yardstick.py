"""Runs measured by what they cost: how many queries (epochs, seconds) each needs to come as far as the first one ends."""

import math
from pathlib import Path

import numpy as np

from dzhpc.errors import InputError
from dzhpc.files import drawing

UNITS = {"epoch": "epochs", "queries": "queries", "seconds": "seconds"}


def table(runs: list, against: str) -> str:
    """A Markdown table, a run a row, the first one being the measure. runs: :class:`dzhpc.files.curves.Curves`.

    Compared is test accuracy where all runs have it, else the loss of evaluations; what a run needs is where its evaluations
    first reach that. Raises InputError for a run without an evaluation.
    """
    for run in runs:
        if not len(run.eval["loss"]) or not len(run.train["step"]):
            raise InputError(f"{run.name}: was never evaluated, so there is nothing to compare")
    by_accuracy = all(math.isfinite(run.eval["accuracy"][-1]) for run in runs)
    key, sign = ("accuracy", 1) if by_accuracy else ("loss", -1)
    target, whole = runs[0].eval[key][-1], runs[0].at(against, runs[0].eval["step"])[-1]
    say = (lambda v: f"{100 * v:.2f} %") if by_accuracy else (lambda v: f"{v:.4g}")
    unit = UNITS[against]
    rows = [
        f"| run | {unit} | {key} at the end | best | {unit} to {say(target)} | of those of {drawing.cell(runs[0].name)} |",
        "|---" * 6 + "|",
    ]
    for run in runs:
        places, values = run.at(against, run.eval["step"]), run.eval[key]
        there = np.flatnonzero(sign * values >= sign * target)
        needed = f"{places[there[0]]:,.4g}" if against == "epoch" and len(there) else ""
        if len(there) and not needed:
            needed = f"{places[there[0]]:,.0f}"
        ratio = f"{places[there[0]] / whole:.3f}" if len(there) else ""
        best = (np.nanmax if by_accuracy else np.nanmin)(values)
        rows.append(
            f"| {drawing.cell(run.name)} | {places[-1]:,.{3 * (against == 'epoch')}f} | {say(values[-1])} | {say(best)} | "
            f"{needed or 'never'} | {ratio} |"
        )
    return "\n".join(rows)


def plot(runs: list, against: str, path: Path) -> None:
    """Loss, and accuracy where there is one, of the evaluations against one axis."""
    plt = drawing.pyplot()
    keys = ["loss", *(["accuracy"] if any(np.isfinite(run.eval["accuracy"]).any() for run in runs) else [])]
    figure, axes = plt.subplots(1, len(keys), figsize=(6.5 * len(keys), 4.5), squeeze=False, layout="constrained")
    for axis, key in zip(axes[0], keys, strict=True):
        for n, run in enumerate(runs):
            places, scale = run.at(against, run.eval["step"]), 100 if key == "accuracy" else 1
            axis.plot(places, scale * run.eval[key], color=f"C{n}", marker=".", label=drawing.plain(run.name))
        axis.set_xscale("log")
        axis.set_xlabel(UNITS[against])
        axis.set_ylabel("test accuracy in %" if key == "accuracy" else "loss of evaluations")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
