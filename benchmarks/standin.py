"""Is a first-order run on the coordinates of CGE a stand-in for CGE's? How far both are apart after each of their first steps.

    python benchmarks/standin.py runs/studies/standin/look  # what slurm/studies/standin.sh has run

Writes a table, a figure and a JSON file into DIR/report. For each network: whether both have the same S; the loss of the batch;
the distance of the two thetas, divided by the way that the first-order one has gone from their common start.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from dzhpc import config as configuration
from dzhpc.files import drawing
from dzhpc.files.metrics import load_columns
from dzhpc.files.runfolder import RunFolder, load_state
from dzhpc.models import zoo

COLUMNS = ("step", "same S", "loss by CGE", "loss first-order", "distance / way", "1 - cosine of the ways")


def flat(params: dict[str, Tensor]) -> Tensor:
    """All parameters [d] in float64."""
    return torch.cat([value.detach().double().flatten() for value in params.values()])


def compare(queried: Path, first_order: Path) -> list[dict]:
    """A row for each step of which both runs have a checkpoint."""
    a, b = ({path.name: path for path in RunFolder(folder).checkpoint_files()} for folder in (queried, first_order))
    losses = [load_columns(folder / "metrics.h5")[0] for folder in (queried, first_order)]
    at = [dict(zip(columns["step"], columns["loss"], strict=True)) for columns in losses]
    rows, start = [], None
    for name in sorted(a.keys() & b.keys()):
        one, other = load_state(a[name])[1], load_state(b[name])[1]
        if start is None:
            config = configuration.parse_written(one.config, str(a[name]))
            start = flat(dict(zoo.build(config.model, config.run.seed).named_parameters()))
        ways = [flat(state.params) - start for state in (one, other)]
        distance = float((ways[0] - ways[1]).norm() / ways[1].norm())
        apart = 1 - float(torch.cosine_similarity(*ways, dim=0))
        same = one.coordinates.tolist() == other.coordinates.tolist()
        row = (one.step, same, float(at[0][one.step]), float(at[1][one.step]), distance, apart)
        rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows


def table(found: dict[str, list[dict]]) -> str:
    """Markdown."""
    lines = [f"| network | {' | '.join(COLUMNS)} |", "|---" * 7 + "|"]
    for name, rows in found.items():
        for row in rows:
            step, same, *numbers = row.values()
            cells = [f"{numbers[0]:.6f}", f"{numbers[1]:.6f}", *(f"{number:.2e}" for number in numbers[2:])]
            lines.append(f"| {name} | {step} | {'yes' if same else 'no'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, list[dict]], path: Path) -> None:
    """The distance against the step."""
    plt = drawing.pyplot()
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, rows in found.items():
        axis.plot([row["step"] for row in rows], [row["distance / way"] for row in rows], marker="o", label=name)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("distance of CGE's theta from first-order's / its way")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="which has autograd/NETWORK, and METHOD/NETWORK of methods that ask")
    folder = p.parse_args().folder
    found = {}
    for queried in sorted(path.parent for path in folder.glob("*/*/checkpoints") if path.parent.parent.name != "autograd"):
        rows = compare(queried, folder / "autograd" / queried.name)
        if rows:
            mu = configuration.parse_written(RunFolder(queried).input.read_text(), str(queried)).zo.mu
            found[f"{queried.name}, mu = {mu:g}"] = rows
    if not found:
        raise SystemExit(f"{folder}: no network of which both runs have a step yet")
    out = folder / "report"
    out.mkdir(exist_ok=True)
    (out / "standin.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "standin.md").write_text(f"{table(found)}\n\n![distance](standin.png)\n")
    plot(found, out / "standin.png")
    print(table(found))


if __name__ == "__main__":
    main()
