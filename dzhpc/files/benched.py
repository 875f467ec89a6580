"""What ``python -m dzhpc.bench --json`` wrote, of one or several calls: a table and a figure."""

import json
from pathlib import Path

from dzhpc.config.paths import shown
from dzhpc.errors import InputError
from dzhpc.files import drawing, owned

KINDS = ("stages", "scaling")
MARK = "![what it takes]("  # by which a report of ours is known


def read(path: Path) -> dict:
    """One file. Raises InputError for what `bench` did not write."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["options"]["kind"] not in KINDS:
            raise ValueError(f"bench {found['options']['kind']} has no figure")
        return found | {"name": path.stem}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{shown(path)}: expected a file of `bench {' or '.join(KINDS)} --json` ({error})") from None


def write(files: list[Path], out: Path) -> tuple[str, list[Path]]:
    """Write ``bench.md`` and ``bench.png``; the table, and the files. Raises InputError."""
    found = [read(path) for path in files]
    kinds = {one["options"]["kind"] for one in found}
    if len(kinds) > 1:
        raise InputError(f"{', '.join(map(shown, files))}: are of {' and '.join(sorted(kinds))}; report them one by one")
    text, draw = (stages_table(found), _draw_stages) if kinds == {"stages"} else (_scaling(found), _draw_scaling)
    try:
        out.mkdir(parents=True, exist_ok=True)
        report, picture = owned.places(out, ("bench.md", "bench.png"), lambda path: owned.holds(path, MARK))
        machines = sorted({", ".join(one["machine"].values()) for one in found})
        report.write_text(f"{text}\n\n{'; '.join(machines)}\n\n{MARK}{picture.name})\n", encoding="utf-8")
        return text, [report, *([picture] if drawing.drawn(lambda: draw(found, picture)) else [])]
    except OSError as error:
        raise InputError(f"{shown(out)}: cannot be written ({error.strerror}); choose another folder with -o") from None


def stages_table(found: list[dict]) -> str:
    """A Markdown table, a row for each estimate of each file."""
    parts = list(found[0]["rows"][0]["parts"])
    lines = [f"| parameters | estimate | engine | {' | '.join(parts)} | seconds in all |", "|---" * 8 + "|"]
    for one in found:
        for row in one["rows"]:
            cells = [f"{row['parts'][part]:.3g}" for part in parts] if row["parts"] else [""] * len(parts)
            lines.append(
                f"| {one['parameters']:,} | {row['estimate']} | {row['engine']} | {' | '.join(cells)} | {row['seconds']:.3g} |"
            )
    return "\n".join(lines)


def _draw_stages(found: list[dict], path: Path) -> None:
    plt = drawing.pyplot()
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for k, one in enumerate(found):
        for n, row in enumerate(one["rows"]):
            place, foot = k + 0.27 * (n - 1), 0.0
            for c, (part, height) in enumerate(
                (row["parts"] or {f"{row['estimate']} by {row['engine']}": row["seconds"]}).items()
            ):
                color = f"C{c}" if row["parts"] else "k"
                axis.bar(place, max(height, 0), 0.24, foot, color=color, label=None if k or (row["parts"] and n) else part)
                foot += max(height, 0)
            axis.annotate(
                f"{row['estimate'].split(',')[0]}\n{row['engine']}", (place, foot), ha="center", va="bottom", fontsize=6
            )
    axis.set_xticks(range(len(found)), [f"{one['parameters']:,}" for one in found])
    axis.set_xlabel("parameters d")
    axis.set_ylabel("seconds an estimate of d queries")
    axis.margins(y=0.15)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _scaling(found: list[dict]) -> str:
    lines = ["| run | ranks | s a step: median (min to max) | steps an hour | speed-up | communication |", "|---" * 6 + "|"]
    for one in found:
        for row in one["rows"]:
            spread = f"{row['step_s']:.3g} ({row['step_min']:.3g} to {row['step_max']:.3g})"
            speed = f"{3600 / row['step_s']:.4g} | {row['speedup']:.2f} | {100 * row['communication']:.1f} %"
            lines.append(f"| {drawing.cell(one['name'])} | {row['ranks']} | {spread} | {speed} |")
    return "\n".join(lines)


def _draw_scaling(found: list[dict], path: Path) -> None:
    plt = drawing.pyplot()
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for n, one in enumerate(found):
        ranks = [row["ranks"] for row in one["rows"]]
        speeds = [3600 / row["step_s"] for row in one["rows"]]
        axis.plot(ranks, speeds, f"C{n}o-", label=drawing.plain(one["name"]))
        axis.plot(ranks, [speeds[0] * r / ranks[0] for r in ranks], f"C{n}:", label="in proportion" if n == 0 else None)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xlabel("ranks")
    axis.set_ylabel("steps an hour")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
