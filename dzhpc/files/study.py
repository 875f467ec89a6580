"""A study: runs of a campaign by method (their first folder) and by a key of their inputs; means over seeds, and a figure."""

import csv
import json
import logging
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dzhpc.config import paths
from dzhpc.errors import InputError
from dzhpc.files import campaign, drawing
from dzhpc.files.metrics import load_columns
from dzhpc.files.runfolder import RunFolder

log = logging.getLogger("dzhpc")
PROBLEM = ("task", "model", "data", "zo", "sparsity", "optim", "stop")  # the tables of an input that decide a result
ELSEWHERE = (("data", "root"), ("model", "weights"), ("stop", "walltime"))  # keys of them that do not


@dataclass
class Published:
    """A number of others: test accuracy in %, and hours, NaN where there is none."""

    method: str
    place: str  # "": whatever the key
    accuracy: float
    hours: float


@dataclass
class Result:
    """What one run has come to."""

    value: float  # test accuracy in %, or the loss where there is no accuracy
    epochs: float
    queries: int
    hours: float  # of ranks
    finished: bool
    is_loss: bool = False


@dataclass
class Group:
    """Runs of one method that differ in nothing but the seed."""

    method: str
    place: str  # the value of the key
    of: float  # epochs
    results: list[Result] = field(default_factory=list)
    runs: dict[int, str] = field(default_factory=dict)  # seed -> the run that counts

    def add(self, run: str, seed: int, result: Result) -> None:
        """A run more. Of two with one seed, which are no two samples, the one that is further counts; the other is named."""
        if seed not in self.runs:
            self.runs[seed] = run
            self.results.append(result)
            return
        k = list(self.runs).index(seed)
        further = (result.finished, result.epochs) > (self.results[k].finished, self.results[k].epochs)
        kept, left = (run, self.runs[seed]) if further else (self.runs[seed], run)
        log.warning("%s: has seed %d, as %s has, and is left out of the means over seeds", left, seed, kept)
        if further:
            self.runs[seed], self.results[k] = run, result

    @property
    def finished(self) -> bool:
        return any(one.finished for one in self.results)

    @property
    def counted(self) -> list[Result]:
        """The finished runs; where none is, the others, as far as they are."""
        return [one for one in self.results if one.finished == self.finished]

    def mean(self, name: str = "value") -> float:
        """Over seeds, of an attribute of the results."""
        return float(np.mean([getattr(one, name) for one in self.counted]))

    @property
    def error(self) -> float:
        """The standard error of the mean over seeds, NaN for one."""
        values = [one.value for one in self.counted]
        return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan

    @property
    def seeds(self) -> str:
        """How many the means are of, and of how many where others have not ended or have failed."""
        of, all_of_them = len(self.counted), len(self.results)
        return f"{of}" if of == all_of_them else f"{of} of {all_of_them}"

    @property
    def reached(self) -> str:
        """Epochs, and of how many where no run is finished."""
        epochs = f"{self.mean('epochs'):.3g}"
        return epochs if self.finished else f"{epochs} of {self.of:g}, not finished"


def groups(folder: Path, over: str) -> list[Group]:
    """The runs below a folder that have been evaluated. over: SECTION.KEY. Raises InputError if there are none."""
    section, dot, key = over.partition(".")
    if not (dot and key):
        raise InputError(f"--over {over}: expected SECTION.KEY, for example sparsity.ratio")
    found: dict[str, Group] = {}
    for one in campaign.members(folder):
        if not one.step:
            log.warning("%s: has made no step (%s), and is in no row", one.name, one.state)
            continue
        path = folder / one.name if (folder / one.name).is_dir() else folder  # which may be a run itself
        settings = _settings(path)
        train, evaluation = load_columns(path / "metrics.h5")
        if not len(evaluation["step"]):
            log.warning("%s: was never evaluated (%s), and is in no row", one.name, one.state)
            continue
        method = one.name.split("/")[0] if "/" in one.name else ""
        place = settings.get(section, {}).get(key)
        same = json.dumps([method, {name: settings.get(name) for name in PROBLEM}], sort_keys=True)
        group = found.setdefault(same, Group(method, "" if place is None else f"{place}", settings["stop"]["epochs"]))
        accuracy = 100 * evaluation["accuracy"][-1]
        value = float(evaluation["loss"][-1] if math.isnan(accuracy) else accuracy)
        queries, is_loss = int(train["queries"][-1]), math.isnan(accuracy)
        result = Result(value, float(one.epoch), queries, one.rank_hours, one.state == "finished", is_loss)
        group.add(one.name, settings["run"]["seed"], result)
    if not found:
        raise InputError(f"{paths.shown(folder)}: no run below has been evaluated yet")
    if not any(group.place for group in found.values()):
        raise InputError(f"--over {over}: no run below has such a key in its input.toml")
    return sorted(found.values(), key=lambda group: (group.method, _order(group.place)))


def published(path: Path, study: str) -> list[Published]:
    """The numbers of a study in a table of tabs: study, method, place, accuracy, hours. Raises InputError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file, delimiter="\t") if row and not row[0].startswith("#")]
            number = lambda text: float(text) if text else math.nan  # noqa: E731
            return [Published(m, place, number(a), number(h)) for name, m, place, a, h in rows if name == study]
    except (OSError, ValueError) as error:
        raise InputError(f"{paths.shown(path)}: cannot be read as a table of published numbers ({error})") from None


def table(found: list[Group], beside: list[Published], over: str) -> str:
    """A Markdown table: a row for each group, and for each published number that has none."""
    is_loss = any(one.is_loss for group in found for one in group.results)
    ours = "loss here" if is_loss else "here"
    rows = [
        f"| method | {over} | published | {ours} | ± | seeds | epochs | queries a run | rank-hours a run |",
        "|---" * 9 + "|",
    ]
    left = list(beside)
    for group in found:
        number = next((one for one in beside if one.method == group.method and one.place in ("", group.place)), None)
        left = [one for one in left if one is not number]
        theirs = f"{number.accuracy:g}" if number else ""
        error = "" if math.isnan(group.error) else f"{group.error:{'.2g' if is_loss else '.2f'}}"
        rows.append(
            f"| {drawing.cell(group.method)} | {drawing.cell(group.place)} | {theirs} | {group.mean():.4g} | {error} "
            f"| {group.seeds} | {group.reached} | {group.mean('queries'):,.0f} | {group.mean('hours'):.3g} |"
        )
    rows += [f"| {drawing.cell(one.method)} | {one.place} | {one.accuracy:g} | not run | | | | | |" for one in left]
    return "\n".join(rows)


def plot(found: list[Group], beside: list[Published], over: str, path: Path) -> None:
    """Accuracy, and rank-hours, against the key, whose values stand side by side; error bars: standard errors over seeds.

    Published numbers of methods that nothing was run of are in the table only.
    """
    plt = drawing.pyplot()
    methods = sorted({one.method for one in found})
    beside = [one for one in beside if one.method in methods and not math.isnan(one.accuracy)]
    places = sorted({one.place for one in found} | {one.place for one in beside if one.place}, key=_order)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for n, method in enumerate(methods):
        color = f"C{n % 10}"
        ours = [group for group in found if group.method == method]
        theirs = [one for one in beside if one.method == method and one.place]
        for one in beside:
            if one.method == method and not one.place:
                left.axhline(one.accuracy, color=color, ls=":", label=drawing.plain(f"{method}, published"))
        at = [places.index(one.place) for one in theirs]
        left.plot(
            at, [one.accuracy for one in theirs], color=color, ls=":", marker="x", label=_label(method, "published", theirs)
        )
        right.plot(at, [one.hours for one in theirs], color=color, ls=":", marker="x")
        at = [places.index(group.place) for group in ours]
        shift = [k + 0.2 * ((n + 0.5) / len(methods) - 0.5) for k in at]
        errors = [0 if math.isnan(group.error) else group.error for group in ours]
        line = "-" if len(set(at)) == len(at) else ""
        for axis, x, name in ((left, shift, "value"), (right, at, "hours")):
            y = [group.mean(name) for group in ours]
            label = _label(method, "", ours) if axis is left else None
            axis.errorbar(x, y, errors if axis is left else None, color=color, ls=line, marker="o", ms=4, capsize=2, label=label)
            hollow = [k for k, group in enumerate(ours) if not group.finished]
            axis.plot([x[k] for k in hollow], [y[k] for k in hollow], color=color, ls="", marker="o", ms=4, mfc="white", zorder=3)
    is_loss = any(one.is_loss for group in found for one in group.results)
    value = "loss of the last evaluation" if is_loss else "test accuracy in %"
    for axis, label in ((left, f"{value} (bars: standard error)"), (right, "rank-hours a run")):
        axis.set_xticks(range(len(places)), places)
        axis.set_xlabel(over)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    right.set_yscale("log")
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _label(method: str, suffix: str, points: list) -> str | None:
    return drawing.plain(f"{method}, {suffix}" if suffix else method) if points else None


def _settings(run: Path) -> dict:
    """The resolved input of a run, without what decides nothing. Raises InputError."""
    path = RunFolder(run).input
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{paths.shown(path)}: cannot be read ({error})") from None
    for section, key in ELSEWHERE:
        settings.get(section, {}).pop(key, None)
    return settings


def _order(place: str) -> tuple[int, float, str]:
    """Numbers by size, before all else."""
    try:
        return 0, float(place), ""
    except ValueError:
        return 1, 0.0, place
