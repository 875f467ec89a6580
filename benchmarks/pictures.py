"""The figures of README and docs/, from the run folders that the three tutorials leave: ``python benchmarks/pictures.py runs``"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from dzhpc.files.curves import read
from dzhpc.tasks.defense.certificates import read as certificates

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
DIGITS = {"digits": "queries (CGE)", "digits-autograd": "exact gradient", "digits-rge": "random directions (RGE)"}
DEFENSE = {
    "defense-small/certify/defense-small": "denoiser, tuned by queries",
    "defense-small-pretrained/certify/defense-small-pretrained": "denoiser, pre-trained",
    "defense-small/certify/defense-small-no-denoiser": "no denoiser",
}


def save(figure, name: str, **options) -> None:
    """A PNG of few colours, which is small."""
    path = PICTURES / f"{name}.png"
    figure.savefig(path, dpi=110, **options)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
    print(path, path.stat().st_size)


def accuracy(axes, runs: Path, axis: str) -> None:
    """Test accuracy of the three estimators."""
    for name, label in DIGITS.items():
        run = read(runs / name)
        axes.plot(run.at(axis, run.eval["step"]), 100 * run.eval["accuracy"], label=label, lw=1.5)
    axes.set(xlabel=axis, ylabel="test accuracy in %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def certified(axes, runs: Path) -> None:
    """Certified accuracy against the radius."""
    for name, label in DEFENSE.items():
        record = certificates(runs / f"{name}.h5")
        radii = np.linspace(0, 0.8, 161)
        axes.plot(radii, [100 * record.certified(r) / len(record.rows) for r in radii], label=label, lw=1.5)
    axes.set(xlabel="l2 radius", ylabel="certified accuracy in %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def wakes(figure, slot, runs: Path) -> None:
    """The last column of the evaluation's figure: vorticity of the fine solver, the coarse one, the corrected one."""
    picture = Image.open(runs / "sol-small/evaluation/states.png").convert("RGB")
    wide, high = picture.size
    grid = slot.subgridspec(3, 1, hspace=0.06)
    for k, name in enumerate(("fine solver", "coarse solver", "coarse solver, corrected")):
        axes = figure.add_subplot(grid[k])
        top = high * (0.0806 + 0.3017 * k)
        axes.imshow(picture.crop((int(wide * 0.7765), int(top), int(wide * 0.945), int(top + 0.2455 * high))))
        axes.set(xticks=[], yticks=[])
        axes.text(0.98, 0.05, name, transform=axes.transAxes, ha="right", fontsize=8)
        if k == 0:
            axes.set_title("a wake after 500 steps", fontsize=10)


def cosine() -> None:
    """The cosine of an RGE to the gradient by theory, and by experiment with a random quadratic; CGE's beside it."""
    d, rng = 1000, np.random.default_rng(0)
    q = np.unique(np.geomspace(1, 4 * d, 25).astype(int))
    g = rng.standard_normal(d)
    tried = []
    for n in q:
        u = rng.standard_normal((n, d))
        estimate = (u @ g) @ u
        tried.append(estimate @ g / np.linalg.norm(estimate) / np.linalg.norm(g))
    figure, axes = plt.subplots(figsize=(6.2, 3.1), layout="constrained")
    axes.semilogx(q / d, np.sqrt(q / (q + d + 1)), label="RGE: sqrt(q / (q + d + 1))", color="C1")
    axes.plot(q / d, tried, "o", ms=4, color="C1", label="RGE, one draw, d = 1000")
    axes.plot(q / d, np.sqrt(np.minimum(q / d, 1)), label="CGE on q of d coordinates", color="C0")
    axes.set(xlabel="queries per coordinate, q / d", ylabel="cosine to the gradient", ylim=(0, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, "cosine")


def main(runs: Path) -> None:
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10})
    cosine()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    accuracy(axes[0], runs, "epoch")
    accuracy(axes[1], runs, "seconds")
    axes[1].set(xlabel="seconds in training steps, two ranks", ylabel="")
    save(figure, "classification")
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    certified(axes, runs)
    save(figure, "defense")
    figure = plt.figure(figsize=(11, 3.3), layout="constrained")
    grid = figure.add_gridspec(1, 3)
    accuracy(figure.add_subplot(grid[0], title="digits, trained from scratch"), runs, "epoch")
    certified(figure.add_subplot(grid[1], title="defence of a black box"), runs)
    wakes(figure, grid[2], runs)
    save(figure, "overview")
    for name in ("errors", "states"):
        picture = Image.open(runs / f"sol-small/evaluation/{name}.png").convert("RGB")
        picture.thumbnail((1100, 2000))
        picture.quantize(128).save(PICTURES / f"solver-{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
