"""The paper's numbers and ours beside them: benchmarks/results/paper.md, from the run folders of slurm/studies/.

    python benchmarks/paper.py runs/studies          # takes in what is there, and writes the page anew
    python benchmarks/paper.py                       # writes the page anew from what was taken in before

Results taken in are kept in benchmarks/results/studies.json, so that the page survives the run folders, of which some may lie
on other machines; a row that is found again replaces the one that was kept. A figure has the runs that are there. What is
said in words, and results of before the studies, are in benchmarks/paper.toml.
"""

import argparse
import csv
import json
import math
import shutil
import tomllib
from collections import defaultdict
from pathlib import Path

import numpy as np

from dzhpc.errors import InputError
from dzhpc.files import campaign, study
from dzhpc.files.metrics import load_columns
from dzhpc.files.runfolder import RunFolder
from dzhpc.tasks.defense import certificates

HERE = Path(__file__).parent
RESULTS = HERE / "results"
KEPT = RESULTS / "studies.json"
PUBLISHED = HERE.parent / "slurm" / "studies" / "published.tsv"
SIZES = ("paper", "small", "look")
PICTURES = {  # of the other studies' reports
    "fig6": "evaluation/errors.png", "table2": "report/certified.png", "standin": "report/standin.png", "a1": "report/bench.png",
    "a6": "report/bench.png",
}  # fmt: skip
RADII = (0.0, 0.25, 0.5, 0.75)


def row(method: str, place: str, value: float, **more) -> dict:
    """A number of ours. error: the standard error over seeds, None where there is one seed."""
    return {"method": method, "place": place, "value": value, "error": None, "seeds": 1, "epochs": "", "queries": None,
            "hours": None} | more  # fmt: skip


def trainings(folder: Path, over: str) -> list[dict]:
    """Means over seeds of a campaign's runs."""
    return [
        row(
            group.method, group.place, group.mean(), error=None if math.isnan(group.error) else group.error,
            seeds=len(group.counted), epochs=group.reached, queries=round(group.mean("queries")), hours=group.mean("hours"),
        )
        for group in study.groups(folder, over)
    ]  # fmt: skip


def certified(folder: Path, over: str) -> list[dict]:
    """Certified accuracy of each method at the paper's radii."""
    rows = []
    for path in sorted(folder.glob("certify/*.h5")):
        record = certificates.read(path)
        n = len(record.rows)
        hours = sum(one.seconds for one in record.rows) / 3600
        for radius in RADII if n else ():
            share = record.certified(radius) / n
            error = 100 * (share * (1 - share) / n) ** 0.5
            rows.append(row(record.name, f"{radius}", 100 * share, error=error, epochs=f"{n} images", hours=hours))
    return rows


def evaluated(folder: Path, over: str) -> list[dict]:
    """Mean absolute errors of the solver in the loop: over the test simulations that have not diverged, then over seeds.

    Queries, epochs and hours are those of the whole runs, of which a checkpoint was chosen.
    """
    errors, runs = defaultdict(list), defaultdict(set)
    path = folder / "evaluation" / "evaluation.tsv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file, delimiter="\t"):
            errors[line["method"], line["steps"], line["run"]].append(float(line["mae"]))
            runs[line["method"], line["steps"]].add(line["run"])
    rows = []
    for (method, steps), names in runs.items():
        all_ = [np.array(errors[method, steps, name]) for name in names]
        means = [float(one[np.isfinite(one)].mean()) for one in all_ if np.isfinite(one).any()]
        if not means:
            continue
        error = float(np.std(means, ddof=1) / len(means) ** 0.5) if len(means) > 1 else None
        told = [f"{epochs:.2g}"] if (epochs := mean_of(folder, names, "epoch")) else []
        if diverged := sum(int((~np.isfinite(one)).sum()) for one in all_):
            told.append(f"{diverged} of {sum(map(len, all_))} diverged")
        queries, hours = mean_of(folder, names, "queries"), mean_of(folder, names, "rank_hours")
        more = {"epochs": ", ".join(told), "queries": queries and round(queries), "hours": hours}
        rows.append(row(method, steps, float(np.mean(means)), error=error, seeds=len(means)) | more)
    return rows


def mean_of(folder: Path, runs: set[str], name: str) -> float | None:
    """Over runs of a campaign, of what their folders say: ``queries``, or an attribute of its members; None without runs."""
    found = [
        int(load_columns(folder / run / "metrics.h5")[0]["queries"][-1])
        if name == "queries"
        else getattr(campaign.member(folder / run, run), name)
        for run in runs
        if run
    ]
    return float(np.mean(found)) if found else None


def staged(folder: Path, over: str) -> list[dict]:
    """The parts of an estimate in seconds."""
    rows = []
    for path in sorted(folder.glob("depth*.json")):
        found = json.loads(path.read_text() or "{}")
        for one in found.get("rows", []):
            for part, seconds in (one["parts"] or {f"engine {one['engine']}, in all": one["seconds"]}).items():
                rows.append(row(f"{one['estimate']}: {part}", str(found["parameters"]), seconds))
    return rows


def scaled(folder: Path, over: str) -> list[dict]:
    """Steps an hour on several numbers of ranks."""
    found = {path.stem: json.loads(path.read_text() or "{}") for path in sorted(folder.glob("*.json"))}
    return [row(name, str(one["ranks"]), 3600 / one["step_s"]) for name, all_ in found.items() for one in all_.get("rows", [])]


def beside(folder: Path, over: str) -> list[dict]:
    """How far CGE and first-order are apart after the first and the last step that both made."""
    path = folder / "report" / "standin.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return [
        row(
            f"{network}, distance / way", str(one["step"]), one["distance / way"], epochs="same S" if one["same S"] else "other S"
        )
        for network, rows in found.items()
        for one in rows
    ]


READ = {
    "runs": trainings,
    "certificates": certified,
    "evaluation": evaluated,
    "stages": staged,
    "scaling": scaled,
    "standin": beside,
}


def take_in(runs: Path, about: dict, kept: dict) -> None:
    """Put what lies below ``runs`` into ``kept``: study -> size -> {rows, machines}; copy the figures."""
    for name, entry in about["study"].items():
        for size in SIZES:
            folder = runs / name / size
            if not folder.is_dir():
                continue
            try:
                rows = READ[entry.get("read", "runs")](folder, entry["over"])
            except InputError:  # nothing to count yet
                rows = []
            if not rows:
                continue
            kept.setdefault(name, {})[size] = joined(kept.get(name, {}).get(size), {"rows": rows, "dates": dates(folder)})
            picture = RESULTS / f"study-{name}-{size}.png"
            if entry.get("read", "runs") == "runs":
                study.plot(study.groups(folder, entry["over"]), study.published(PUBLISHED, name), entry["over"], picture)
            elif (drawn := folder / PICTURES[name]).exists():
                shutil.copy(drawn, picture)


def joined(before: dict | None, now: dict) -> dict:
    """What was taken in of a size of a study, and before it what was kept of rows that are not among them."""
    again = {(one["method"], one["place"]) for one in now["rows"]}
    rest = [one for one in before["rows"] if (one["method"], one["place"]) not in again] if before else []
    if not rest:
        return now
    return {"rows": rest + now["rows"], "dates": "; ".join(dict.fromkeys((*before["dates"].split("; "), now["dates"])))}


def dates(folder: Path) -> str:
    """The days on which the launches of a campaign began, the versions that ran, and on what."""
    manifests = [one for path in folder.rglob("launches") for _, one in RunFolder(path.parent).manifests()]
    days = sorted({one["time"][:10] for one in manifests if "time" in one})
    torch = sorted({one["versions"]["torch"] for one in manifests if "torch" in one.get("versions", {})})
    devices = sorted({host["device"].partition(" (")[0] for one in manifests for host in one.get("hosts", [])} - {"cpu"})
    return ", ".join([" to ".join(dict.fromkeys((days[0], days[-1]))), f"torch {', '.join(torch)}", *devices]) if days else ""


def page(about: dict, kept: dict) -> str:
    """The Markdown of paper.md."""
    parts = [about["head"].strip()]
    for name, entry in about["study"].items():
        parts.append(f"## {entry['title']}" + (f" (`slurm/studies/{name}.sh`)" if entry["over"] else ""))
        if entry.get("text"):
            parts.append(entry["text"].strip())
        parts.append(table(entry, study.published(PUBLISHED, name), kept.get(name, {})))
        for size in SIZES:
            if size in kept.get(name, {}):
                differs = entry.get("differs", {}).get(size) or about["differs"].get(size, "")
                told = f"*{size}*: {differs.strip()} {kept[name][size]['dates']}".strip().rstrip(".")
                parts.append(f"{told}. `SIZE={size} bash slurm/studies/{name}.sh`")
                if (RESULTS / f"study-{name}-{size}.png").exists():
                    parts.append(f"![{name}, {size}](study-{name}-{size}.png)")
        if entry.get("found"):
            parts.append(entry["found"].strip())
    return "\n\n".join(parts) + "\n"


def table(entry: dict, numbers: list, sizes: dict) -> str:
    """A row a number: the paper's, with ours at each size and of before the studies; "not run" where there is none of any."""
    unit = entry.get("unit", "accuracy in %")
    lines = [
        f"| method | {entry['over'] or 'of'} | paper: {unit} | ours | ± | seeds | size | epochs | queries a run "
        "| rank-hours a run |",
        "|---" * 10 + "|",
    ]
    ours = [(size, one) for size in SIZES for one in sizes.get(size, {}).get("rows", [])]
    ours += [
        (f"[before]({one['source']})", row(one["method"], one["place"], one["value"]) | one) for one in entry.get("before", [])
    ]
    done = set()
    for number in numbers:
        mine = [k for k, (_, one) in enumerate(ours) if one["method"] == number.method and number.place in ("", one["place"])]
        done |= set(mine)
        lines += [line(size, one, number) for size, one in (ours[k] for k in mine)]
        if not any("paper" in (ours[k][0], ours[k][1].get("size")) for k in mine):
            lines.append(f"| {number.method} | {number.place} | {number.accuracy:g} | not run | | | paper | | | |")
    lines += [line(size, one, None) for k, (size, one) in enumerate(ours) if k not in done]
    return "\n".join(lines)


def line(size: str, one: dict, number) -> str:
    """One row of the table."""
    error = "" if one["error"] is None else f"{one['error']:.2g}"
    queries = "" if one["queries"] is None else f"{one['queries']:,}"
    hours = "" if one["hours"] is None else f"{one['hours']:.2g}"
    theirs = f"{number.accuracy:g}" if number else ""
    cells = [
        one["method"],
        one["place"],
        theirs,
        f"{one['value']:.4g}",
        error,
        str(one["seeds"]),
        size,
        one["epochs"],
        queries,
        hours,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", type=Path, help="folders of studies: RUNS/STUDY/SIZE/...")
    about = tomllib.loads((HERE / "paper.toml").read_text(encoding="utf-8"))
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    for runs in p.parse_args().runs:
        take_in(runs, about, kept)
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (RESULTS / "paper.md").write_text(page(about, kept), encoding="utf-8")


if __name__ == "__main__":
    main()
