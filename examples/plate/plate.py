"""What belongs to plate.toml: the measurement, the misfit, and the figure. ``python examples/plate/plate.py runs/plate``"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from dzhpc.files.checkpoint import load_checkpoint
from dzhpc.tasks.template import Files

CASE = Path(__file__).with_name("case")
UNITS = {"long": 1e11, "across": 1e10, "shear": 5e9}  # Pa, as in plate.toml
SHEET = {"long": 1.35, "across": 1.0, "shear": 1.1}  # a data sheet's, in UNITS, as in plate.toml
TRUE = {"long": 118e9, "across": 8.4e9, "shear": 4.6e9}
MEASURED = np.array([31.43, 48.54, 142.69, 196.89, 220.13, 307.76])  # Hz, of a plate with TRUE, with errors of 0.2 %


def frequencies(folder):
    """The natural frequencies in Hz [6] that ccx has written down."""
    lines = (Path(folder) / "plate.dat").read_text().splitlines()
    rows = [line.split() for line in lines if len(line.split()) == 5 and line.split()[0].isdigit()]
    return np.array([float(row[3]) if float(row[1]) > 0 else np.inf for row in rows[:6]])  # else the plate is unstable


def errors(folder):
    """The residuals: the frequencies' errors in percent [6]; inf, infeasible, for moduli of no material."""
    return 100 * (frequencies(folder) / MEASURED - 1)


def simulated(moduli):
    """The frequencies of a plate with other moduli, in Pa."""
    values = {name: np.array(float(value)) for name, value in moduli.items()}
    with tempfile.TemporaryDirectory() as folder:
        Files([str(CASE)], {name: () for name in values}).write(Path(folder), values)
        subprocess.run(["ccx", "plate"], cwd=folder, check=True, capture_output=True, timeout=60)
        return frequencies(folder)


def main(run, picture="moduli.png"):
    from matplotlib.figure import Figure

    states = [load_checkpoint(path) for path in sorted((Path(run) / "checkpoints").glob("step-*.h5"))]
    steps = [(0, SHEET), *((state.step, {name: float(state.params[name]) for name in SHEET}) for state in states)]
    figure = Figure((9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, (name, true) in enumerate(TRUE.items()):
        found = [theta[name] * UNITS[name] for _, theta in steps]
        print(f"{name}: {found[-1] / 1e9:.2f} GPa; the truth is {true / 1e9:.2f}")
        left.plot([step for step, _ in steps], np.array(found) / true, f"C{k}", label=f"{name}: {found[-1] / 1e9:.1f} GPa")
    left.axhline(1, color="k", ls=":", lw=1)
    left.set(xlabel="step", xticks=range(steps[-1][0] + 1), ylabel="modulus / true modulus")
    left.legend(fontsize=8)
    for k, (step, theta) in enumerate((steps[0], steps[-1])):
        f = simulated({name: theta[name] * unit for name, unit in UNITS.items()})
        print(f"step {step}: frequencies {f.round(2).tolist()} Hz, off by {np.sqrt(np.mean((f / MEASURED - 1) ** 2)):.2%}")
        right.bar(np.arange(1, 7) + 0.4 * k - 0.2, 100 * (f / MEASURED - 1), 0.4, label=f"step {step}")
    right.axhline(0, color="k", lw=0.5)
    right.margins(y=0.25)
    right.set(xlabel="mode", ylabel="frequency: error (%)")
    right.legend(fontsize=8)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
