"""Runs side by side, from their metrics: a table of final numbers, and curves of loss and accuracy."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dzhpc.config.paths import shown
from dzhpc.errors import InputError
from dzhpc.files import campaign, drawing, owned, study, yardstick
from dzhpc.files.metrics import load_columns
from dzhpc.files.runfolder import REPORT
from dzhpc.job.log import duration


@dataclass
class Curves:
    """The rows of one run folder."""

    name: str
    train: dict[str, np.ndarray]
    eval: dict[str, np.ndarray]

    @property
    def seconds(self) -> np.ndarray:
        """Wall time in training steps up to each of them."""
        return np.cumsum(self.train["step_s"])

    def at(self, axis: str, steps: np.ndarray) -> np.ndarray:
        """Where on an axis ("epoch", "queries", "seconds") the given steps lie."""
        values = self.seconds if axis == "seconds" else self.train[axis]
        return np.interp(steps, self.train["step"], values)


def read(folder: Path) -> Curves:
    """One run. Raises InputError if the folder holds no metrics."""
    path = folder / "metrics.h5"
    if not path.exists():
        raise InputError(f"{shown(folder)}: no metrics.h5; expected a run folder that has trained at least one step")
    return Curves(folder.resolve().name, *load_columns(path))


def table(runs: list[Curves]) -> str:
    """A Markdown table, a run a row."""
    rows = [
        "| run | steps | epochs | queries | train loss | test loss | test accuracy | best | wall time |",
        "|---" * 9 + "|",
    ]
    for run in runs:
        t, e = run.train, run.eval
        if not len(t["step"]):
            rows.append(f"| {drawing.cell(run.name)} | 0 | | | | | | | |")
            continue
        tail = float(np.mean(t["loss"][-max(1, len(t["loss"]) // 10) :]))
        loss = f"{e['loss'][-1]:.4g}" if len(e["loss"]) else ""
        known = len(e["accuracy"]) and not math.isnan(e["accuracy"][-1])
        last, best = (f"{100 * f(e['accuracy']):.2f} %" if known else "" for f in (lambda a: a[-1], np.nanmax))
        rows.append(
            f"| {drawing.cell(run.name)} | {int(t['step'][-1])} | {t['epoch'][-1]:.2f} | {int(t['queries'][-1]):,} | {tail:.4g} "
            f"| {loss} | {last} | {best} | {duration(run.seconds[-1])} |"
        )
    return "\n".join(rows)


def longest(runs: list[Curves]) -> float:
    """Seconds of the longest run."""
    return max(run.seconds[-1] for run in runs)


def plot(runs: list[Curves], path: Path) -> None:
    """Loss and accuracy against epoch, queries and wall time; several runs overlaid."""
    plt = drawing.pyplot()
    from matplotlib.ticker import EngFormatter, MaxNLocator

    with_accuracy = any(np.isfinite(run.eval["accuracy"]).any() for run in runs)
    rows = 2 if with_accuracy else 1
    figure, axes = plt.subplots(rows, 3, figsize=(13, 3.6 * rows), squeeze=False, sharex="col", layout="constrained")
    unit, seconds = next((u, s) for u, s in (("hours", 3600), ("minutes", 60), ("seconds", 1)) if s == 1 or longest(runs) > 3 * s)
    axis_labels = (("epoch", "epoch", 1), ("queries", "queries", 1), ("seconds", f"wall time in {unit}", seconds))
    for k, (axis, label, scale) in enumerate(axis_labels):
        for n, run in enumerate(runs):
            color, steps = f"C{n}", run.eval["step"]
            axes[0, k].plot(run.at(axis, run.train["step"]) / scale, run.train["loss"], color=color, lw=0.6, alpha=0.5)
            axes[0, k].plot(
                run.at(axis, steps) / scale,
                run.eval["loss"],
                color=color,
                marker="." if len(steps) < 60 else "",
                label=drawing.plain(run.name),
            )
            if with_accuracy:
                axes[1, k].plot(
                    run.at(axis, steps) / scale,
                    100 * run.eval["accuracy"],
                    color=color,
                    marker=".",
                    label=drawing.plain(run.name),
                )
        for row in range(rows):
            axes[row, k].set_xlabel(label)
            axes[row, k].tick_params(labelbottom=True)
            axes[row, k].grid(alpha=0.3)
    for row in range(rows):
        axes[row, 1].xaxis.set_major_formatter(EngFormatter())
        axes[row, 1].xaxis.set_major_locator(MaxNLocator(5))
    losses = np.concatenate([run.train["loss"] for run in runs])
    if losses.min() > 0 and losses.max() > 5 * losses.min():
        for k in range(3):
            axes[0, k].set_yscale("log")
    axes[0, 0].set_ylabel("loss (thin: training batches; dots: test set)")
    if with_accuracy:
        axes[1, 0].set_ylabel("test accuracy in %")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(folders: list[Path], out: Path, against: str | None = None) -> tuple[str, list[Path]]:
    """Write ``report.md`` and ``curves.png``; the table, and the files. Raises InputError.

    against: one axis, see :mod:`dzhpc.files.yardstick`; None: all of them.
    """
    runs = [read(Path(folder)) for folder in folders]
    text = yardstick.table(runs, against) if against else table(runs)
    return text, _write(out, ", ".join(run.name for run in runs), text, runs, against)


def write_campaign(folder: Path, out: Path) -> tuple[str, list[Path]]:
    """The same of all runs at or below a folder; the table of their states, and the files. Raises InputError."""
    members, runs = campaign.members(folder), []
    for member in members:
        if member.step:
            path = folder / member.name
            runs.append(read(path if path.is_dir() else folder))
            runs[-1].name = member.name
    text = campaign.table(members)
    return text, _write(out, f"Campaign {shown(folder)}", text, runs)


def write_study(folder: Path, out: Path, over: str, beside: list[study.Published]) -> tuple[str, list[Path]]:
    """The same by method and by a key of the inputs, see :mod:`dzhpc.files.study`. Raises InputError."""
    found = study.groups(folder, over)
    text = study.table(found, beside, over)
    return text, _write_all(out, f"{shown(folder)} over {over}", text, lambda path: study.plot(found, beside, over, path))


def _write(out: Path, title: str, text: str, runs: list[Curves], against: str | None = None) -> list[Path]:
    trained = [run for run in runs if len(run.train["step"])]
    draw = (lambda path: yardstick.plot(trained, against, path)) if against else (lambda path: plot(trained, path))
    return _write_all(out, title, text, draw if trained else None)


def _write_all(out: Path, title: str, text: str, draw: Callable[[Path], None] | None) -> list[Path]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        report, picture = owned.places(out, ("report.md", "curves.png"), lambda path: owned.holds(path, REPORT))
        content = f"# {' '.join(title.split())}\n\n{text}\n\n{REPORT}{picture.name})\n"
        report.write_text(content, encoding="utf-8", errors="backslashreplace")
        return [report, *([picture] if draw and drawing.drawn(lambda: draw(picture)) else [])]
    except OSError as error:
        raise InputError(f"{shown(out)}: cannot be written ({error.strerror or error}); choose another folder with -o") from None
