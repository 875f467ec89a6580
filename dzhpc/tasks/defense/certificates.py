"""Certificates read back: the usual TSV, the table of certified accuracy at several radii, the plot of all methods overlaid."""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path

import numpy as np

from dzhpc.config.paths import shown
from dzhpc.errors import CheckpointError, InputError
from dzhpc.files import drawing, h5, owned
from dzhpc.tasks.defense.smoothing import ABSTAIN, Certificate, confidence_interval

KIND = "dzhpc-certificates"
STORED = {
    "idx": np.int64, "label": np.int64, "selected": np.int64, "predict": np.int64, "n_a": np.int64, "n": np.int64,
    "radius": np.float64, "correct": np.bool_, "seconds": np.float64, "done": np.bool_,
}  # fmt: skip
READ = {"name": str, "sigma": float, "n": int, "alpha": float, "adaptive": bool, "grid": float}  # of ``about``, by a table
MARK = "![certified accuracy]("  # by which a table of ours is known
COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")


def save(path: Path, rows: list[Certificate], about: Mapping[str, object]) -> None:
    """Write certificates, a row an image: raw counts, radii in full precision (NaN: abstained, or not done yet), and ``about`` as
    attributes. Raises CheckpointError if they cannot be written; then the old file, if any, is whole."""

    def fill(file: h5.File) -> None:
        file.create_group("about").attrs.update(about)
        group = file.create_group("images")
        for name, kind in STORED.items():
            values = [getattr(row, name) for row in rows]
            group[name] = np.array([np.nan if v is None else v for v in values], kind)

    h5.write(path, KIND, fill, CheckpointError)


def load(path: str | Path) -> tuple[list[Certificate], dict[str, object]]:
    """(rows, about), as given to :func:`save`. Raises CheckpointError if the file is missing or damaged."""
    with h5.opened(Path(path), KIND, CheckpointError) as file:
        about = h5.attributes(file["about"])
        about |= {key: kind(about[key]) for key, kind in READ.items()}
        if min(about["grid"], about["n"]) <= 0:
            raise ValueError(f"grid = {about['grid']}, n = {about['n']}")
        columns = [file["images"][name][()].tolist() for name in STORED]
        rows = [dict(zip(STORED, row, strict=True)) for row in zip(*columns, strict=True)]
        for row in rows:
            del row["predict"], row["correct"]  # they follow from the others
            row["radius"] = None if np.isnan(row["radius"]) else row["radius"]
        return [Certificate(**row) for row in rows], about


@dataclass
class Record:
    """The certificates of one method: finished images only, by their index."""

    name: str
    rows: list[Certificate]
    about: dict[str, object]

    def certified(self, radius: float) -> int:
        """How many images are certified to get the right class within an l2 radius."""
        return sum(row.correct and row.radius >= radius for row in self.rows)

    @property
    def abstained(self) -> float:
        """The fraction of images for which no class could be certified."""
        return sum(row.predict == ABSTAIN for row in self.rows) / max(1, len(self.rows))

    @property
    def samples(self) -> float:
        """Noisy copies an image, on average, beside those that choose the class."""
        return sum(row.n for row in self.rows) / max(1, len(self.rows))


def read(path: str | Path) -> Record:
    """The record in a file. Raises CheckpointError if it is missing or damaged."""
    rows, about = load(path)
    return Record(about["name"], sorted((row for row in rows if row.done), key=lambda row: row.idx), about)


def rounded_down(radius: float, digits: int = 6) -> str:
    """A radius as text that is never larger than it: ``0.249589``."""
    return str(Decimal(radius).quantize(Decimal(1).scaleb(-digits), ROUND_FLOOR))


def tsv(record: Record) -> str:
    """A line an image: idx, label, predict (-1: abstained), radius (0.0 then), correct, time."""
    lines = ["\t".join(COLUMNS)]
    for row in record.rows:
        radius = "0.0" if row.radius is None else rounded_down(row.radius)
        time = datetime.timedelta(seconds=row.seconds)
        lines.append("\t".join(map(str, (row.idx, row.label, row.predict, radius, int(row.correct), time))))
    return "\n".join(lines) + "\n"


def radii(records: list[Record]) -> list[float]:
    """0, grid, 2 grid, ..., as far as any image is certified."""
    grid = min(record.about["grid"] for record in records)
    last = max((row.radius for record in records for row in record.rows if row.correct), default=0.0)
    return [k * grid for k in range(int(last / grid) + 1)]


def table(records: list[Record]) -> str:
    """Certified accuracy in % at each radius with its Clopper-Pearson interval, abstention rate, samples used; Markdown."""
    at = radii(records)
    columns = ["method", "sigma", "images", "samples an image", "abstained", *(f"r = {_short(radius)}" for radius in at)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for record in records:
        total = len(record.rows)
        of = record.about["n"]
        used = f"{record.samples:,.0f} of {of:,} ({100 * record.samples / of:.0f} %)" if record.about["adaptive"] else f"{of:,}"
        cells = [drawing.cell(record.name), f"{record.about['sigma']:g}", str(total), used]
        if total:
            cells += [f"{100 * record.abstained:.1f} %", *(_with_interval(record.certified(radius), total) for radius in at)]
        lines.append(f"| {' | '.join(cells + [''] * (len(columns) - len(cells)))} |")
    levels = sorted({f"{record.about['alpha']:g}" for record in records})
    return "\n".join([*lines, "", f"Certified accuracy in % (95 % confidence interval); alpha = {', '.join(levels)} an image."])


def _short(radius: float) -> str:
    """Two digits where they say it all, else as many as a grid may have."""
    return f"{radius:.2f}" if abs(radius - round(radius, 2)) < 1e-9 else f"{radius:.6g}"


def _with_interval(k: int, n: int) -> str:
    low, high = confidence_interval(k, n)
    return f"{100 * k / n:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def plot(records: list[Record], path: Path) -> None:
    """Certified accuracy against the radius, a curve a method, with its confidence band where there are few."""
    plt = drawing.pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    for k, record in enumerate(records):
        total, steps = len(record.rows), sorted({0.0} | {row.radius for row in record.rows if row.correct})
        counts = [record.certified(radius) for radius in steps]
        steps, counts = [*steps, steps[-1]], [*counts, 0]
        bands = np.array([confidence_interval(count, total) for count in counts])
        style = dict(color=f"C{k % 10}", linestyle=("-", "--", ":")[k // 10 % 3])
        name = f"{record.name} (adaptive)" if record.about["adaptive"] else record.name
        axes.step(steps, 100 * np.array(counts) / total, where="pre", label=drawing.plain(name), lw=1.6, **style)
        if len(records) <= 3:  # more of them hide each other; the table has all intervals
            axes.fill_between(steps[:-1], *(100 * bands[:-1].T), step="pre", color=style["color"], alpha=0.1, lw=0)
    axes.set_xlabel("l2 radius, for pixels in [0, 1]")
    axes.set_ylabel("certified accuracy in %")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(files: list[Path], out: Path) -> tuple[str, list[Path]]:
    """Write ``certified.md`` and ``certified.png`` of several records; the table, and these files.

    Raises CheckpointError or InputError.
    """
    records = [read(file) for file in files]
    text = table(records)
    some = [record for record in records if record.rows]
    try:
        out.mkdir(parents=True, exist_ok=True)
        ours = lambda path: owned.holds(path, MARK)  # noqa: E731
        report, picture = owned.places(out, ("certified.md", "certified.png"), ours)
        content = f"# Certified accuracy\n\n{text}\n\n{MARK}{picture.name})\n"
        report.write_text(content, encoding="utf-8", errors="backslashreplace")
        return text, [report, *([picture] if some and drawing.drawn(lambda: plot(some, picture)) else [])]
    except OSError as error:
        raise InputError(f"{shown(out)}: cannot be written ({error.strerror}); choose another folder with -o") from None


def write_tsv(record: Record, path: Path) -> None:
    """Write :func:`tsv`, not over a file of somebody else. Raises InputError."""
    try:
        (place,) = owned.places(path.parent, [path.name], lambda found: owned.holds(found, "\t".join(COLUMNS)))
        place.write_text(tsv(record), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"{shown(path)}: cannot be written ({error.strerror})") from None
