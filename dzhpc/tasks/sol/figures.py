"""Figures of the solver in the loop: error against time; states of reference, coarse and corrected solver side by side; a GIF.

Of the wake the vorticity is drawn, the flow from left to right; of a user's solver the first channel, as lines or as images.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dzhpc.files import drawing
from dzhpc.tasks.sol.evaluation import Experiment
from dzhpc.tasks.sol.results import SRC, Method
from dzhpc.tasks.sol.wake import DT, LENGTH, SPEED, Wake, unpack, viscosity

REFERENCE = "reference"
ROD = LENGTH / 2  # both coordinates of the rod's centre
GREY, EMPTY = "0.45", "0.9"
GIF_FRAMES, FRAMES_A_SECOND = 80, 12
Rows = dict[str, Tensor]  # name -> states of one simulation at some steps [K, ...]


def vorticity(states: Tensor, wake: Wake) -> Tensor:
    """omega D / U = (dv/dx - du/dy) D / U at the inner corners of the cells, [N, 2, nx + 1, ny + 1] -> [N, nx - 1, ny - 1]."""
    u, v = unpack(states)
    omega = v[:, 1:, 1:-1] - v[:, :-1, 1:-1] - u[:, 1:-1, 1:] + u[:, 1:-1, :-1]
    return omega / wake.dx * (2 * wake.radius / SPEED)


class Scene:
    """What is drawn of the states of an experiment, and its units. wake: None for a user's solver."""

    def __init__(self, wake: Wake | None):
        self._wake = wake
        self.time_label = "t U / D" if wake else "step"
        self.error_label = "mean |u − u$_{ref}$| over all faces, in U" if wake else "mean |difference| to the reference"
        self.value_label = "vorticity ω D / U" if wake else "first channel"
        self._style = {"cmap": "RdBu_r", "interpolation": "bilinear"} if wake else {"cmap": "viridis"}
        if wake:  # x runs downwards, so that the flow is turned, not mirrored, and the sign of the vorticity is what one sees
            d, (first, last) = 2 * wake.radius, (wake.dx / 2, LENGTH - wake.dx / 2)
            self._style["extent"] = [(x - ROD) / d for x in (first, last + LENGTH, last, first)]

    def time(self, step):
        """Since the start, in units of the label."""
        return step * DT * SPEED / (2 * self._wake.radius) if self._wake else step

    def stamp(self, step: int) -> str:
        """A time as a title."""
        return f"{self.time_label} = {self.time(step):.1f}" if self._wake else f"step {step}"

    def simulation(self, parameter: float) -> str:
        """Which one it is, as a title."""
        if self._wake is None:
            return f"parameter {parameter:.10g}"
        return f"re = {parameter:.10g}, U D / ν = {SPEED * 2 * self._wake.radius / viscosity(parameter):g}"

    def values(self, states: Tensor) -> np.ndarray:
        """What is drawn of states [K, ...]: images [K, rows, columns], or lines [K, X]."""
        if self._wake:
            return vorticity(states, self._wake).numpy()
        return (states if states.ndim == 2 else states[:, 0]).numpy()

    def limits(self, values: np.ndarray) -> tuple[float, float]:
        """Of colours or lines, by the reference: symmetric for the vorticity, but for its half per cent at the rod."""
        if self._wake:
            top = float(np.quantile(np.abs(values), 0.995))
            return -top, top
        margin = 0.1 * float(np.ptp(values))
        return float(values.min()) - margin, float(values.max()) + margin

    def image(self, axes, values: np.ndarray, limits: tuple[float, float]):
        """Draw an image; the artist."""
        from matplotlib.patches import Circle

        axes.set_facecolor(EMPTY)
        shown = axes.imshow(values, vmin=limits[0], vmax=limits[1], **self._style)
        if self._wake:
            axes.add_patch(Circle((0, 0), 0.5, facecolor="0.3", edgecolor="none"))
        return shown

    def name_axes(self, left: list, bottom: list) -> None:
        """Labels of the outer axes of a grid of images."""
        if self._wake:
            for axes in left:
                axes.set_ylabel("x / D", fontsize=8)
            for axes in bottom:
                axes.set_xlabel("y / D, along the flow →", fontsize=8)


def colors(names: list[str]) -> dict[str, str]:
    """A colour a method; reference and SRC are no methods and stay black and grey."""
    methods = [name for name in names if name not in (REFERENCE, SRC)]
    return {REFERENCE: "k", SRC: GREY} | {name: f"C{k % 10}" for k, name in enumerate(methods)}


def errors(methods: list[Method], scene: Scene, path: Path) -> None:
    """Error against time: mean over simulations and seeds, shaded from the smallest to the largest of them.

    A simulation that diverges is drawn alone, up to a cross on the frame, and is in neither mean nor shade.
    """
    plt = drawing.pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    color, top = colors([method.name for method in methods]), 0.0
    for method in methods:
        curves = method.errors.flatten(0, 1).numpy()
        time, lost = scene.time(np.arange(1, curves.shape[1] + 1)), np.isinf(curves).any(1)
        style = {"color": color[method.name], "ls": "--" if method.name == SRC else "-"}
        label = drawing.plain(f"{method.name} ({lost.sum()} of {len(lost)} diverged)" if lost.any() else method.name)
        if not lost.all():
            kept = curves[~lost]
            top = max(top, kept.max())
            axes.plot(time, kept.mean(0), label=label, lw=1.8, **style)
            axes.fill_between(time, kept.min(0), kept.max(0), color=style["color"], alpha=0.15, lw=0)
        for k, curve in enumerate(curves[lost]):
            end = int(np.isinf(curve).argmax())
            axes.plot(time[:end], curve[:end], lw=0.8, label=label if lost.all() and k == 0 else None, **style)
            axes.plot(time[end], 1, "x", color=style["color"], transform=axes.get_xaxis_transform(), clip_on=False)
    axes.set_xlabel(scene.time_label)
    axes.set_ylabel(scene.error_label)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.05 * top if top else None)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="mean (line), smallest to largest (shade)", title_fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def states(rows: Rows, steps: list[int], scene: Scene, title: str, path: Path) -> None:
    """One simulation at a few steps: a row a solver and a column a time, or one row of lines."""
    plt = drawing.pyplot()
    values = {name: scene.values(these) for name, these in rows.items()}
    limits = scene.limits(values[REFERENCE])
    if values[REFERENCE].ndim == 2:
        figure, grid = plt.subplots(1, len(steps), figsize=(3 * len(steps), 3), sharey=True, squeeze=False, layout="constrained")
        for k, step in enumerate(steps):
            _lines(grid[0, k], {name: drawn[k] for name, drawn in values.items()}, limits)
            grid[0, k].set_title(scene.stamp(step), fontsize=9)
        grid[0, 0].set_ylabel(scene.value_label)
        grid[0, 0].legend(fontsize=8)
    else:
        height, width = _size(values[REFERENCE])
        size = (len(steps) * width + 1.2, len(rows) * (height + 0.12) + 0.7)
        figure, grid = plt.subplots(
            len(rows), len(steps), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
        for row, (name, drawn) in zip(grid, values.items(), strict=True):
            for k, axes in enumerate(row):
                shown = scene.image(axes, drawn[k], limits)
                _mark_divergence(axes, drawn[k])
                axes.tick_params(labelsize=7)
            row[0].annotate(
                drawing.plain(name), (-0.32, 0.5), xycoords="axes fraction", rotation=90, ha="center", va="center", weight="bold"
            )
        for axes, step in zip(grid[0], steps, strict=True):
            axes.set_title(scene.stamp(step), fontsize=9)
        scene.name_axes(list(grid[:, 0]), list(grid[-1]))
        figure.colorbar(shown, ax=grid, label=scene.value_label, extend="both", shrink=0.8, pad=0.01)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def animation(rows: Rows, steps: list[int], scene: Scene, title: str, path: Path) -> None:
    """One simulation, a frame a step: the solvers side by side, or their lines on one another. A GIF."""
    from matplotlib.animation import FuncAnimation, PillowWriter

    plt = drawing.pyplot()
    values = {name: scene.values(these) for name, these in rows.items()}
    limits = scene.limits(values[REFERENCE])
    if values[REFERENCE].ndim == 2:
        figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
        drawn = _lines(axes, {name: these[0] for name, these in values.items()}, limits)
        axes.legend(fontsize=8, loc="upper right")
        update = lambda artist, these: artist.set_ydata(these)  # noqa: E731
    else:
        columns, (height, width) = len(rows) if len(rows) <= 3 else math.ceil(len(rows) / 2), _size(values[REFERENCE])
        size = (columns * width, math.ceil(len(rows) / columns) * (height + 0.25) + 0.3)
        figure, grid = plt.subplots(math.ceil(len(rows) / columns), columns, figsize=size, squeeze=False, layout="constrained")
        drawn = {}
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
        for axes, (name, these) in zip(grid.flat, values.items(), strict=False):
            drawn[name] = scene.image(axes, these[0], limits)
            axes.set_title(drawing.plain(name), fontsize=9, pad=3)
        for axes in grid.flat[len(rows) :]:
            axes.set_axis_off()
        update = lambda artist, these: artist.set_data(these)  # noqa: E731
    heading = figure.suptitle("", fontsize=9)

    def draw(k: int) -> None:
        heading.set_text(f"{title}, {scene.stamp(steps[k])}")
        for name, artist in drawn.items():
            update(artist, values[name][k])

    FuncAnimation(figure, draw, frames=len(steps)).save(path, PillowWriter(FRAMES_A_SECOND), dpi=80)
    plt.close(figure)


def _lines(axes, values: dict[str, np.ndarray], limits: tuple[float, float]) -> dict:
    """Draw lines over one another; the artists by name."""
    color = colors(list(values))
    thin = {REFERENCE: {"lw": 2}, SRC: {"ls": "--"}}
    drawn = {
        name: axes.plot(line, color=color[name], label=drawing.plain(name), **thin.get(name, {}))[0]
        for name, line in values.items()
    }
    axes.set_xlabel("grid point")
    axes.set_ylim(*limits)
    axes.grid(alpha=0.3)
    return drawn


def _size(images: np.ndarray) -> tuple[float, float]:
    """(height, width) of a panel in inches, for images [K, rows, columns]."""
    _, rows, columns = images.shape
    scale = min(3.0 / columns, 3.0 / rows)
    return rows * scale, columns * scale


def _mark_divergence(axes, values: np.ndarray) -> None:
    if np.isnan(values).all():
        axes.text(0.5, 0.5, "diverged", transform=axes.transAxes, ha="center", va="center", fontsize=9)


def shown_steps(last: int) -> tuple[list[int], list[int]]:
    """(five steps up to ``last`` for a figure, closer at the beginning, where the solvers part; evenly spaced ones for a GIF)."""
    few = sorted({max(1, round(last * share)) for share in (0.05, 0.1, 0.2, 0.5, 1)})
    return few, np.unique(np.linspace(0, last, GIF_FRAMES).round().astype(int)).tolist()


def draw(experiment: Experiment, methods: list[Method], steps: int, files: Sequence[Path]) -> None:
    """Draw errors, states and, where it has a third file, the animation (of the middle test simulation).

    Of a method with several seeds the states are those of the run that did best on the valid simulations.
    """
    task, test = experiment.config.task, experiment.reference.test
    wake = Wake(task.resolution, task.radius) if experiment.reference.staggered else None
    scene, number = Scene(wake), len(test.parameters) // 2
    errors(methods, scene, files[0])
    few, many = shown_steps(steps)
    keep = sorted({*few, *(many if files[2:] else ())})
    rows = {REFERENCE: {step: test.states[number, step].cpu() for step in keep}}
    for method in methods:
        best = min(method.runs, key=lambda run: run.scores[run.chosen] if run else 0)
        done = experiment.roll("test", number, best, best.chosen if best else 0, steps, keep)
        rows[method.name] = {step: kept[0] for step, kept in done.kept.items()}
    title = scene.simulation(float(test.parameters[number]))
    at = lambda steps: {name: torch.stack([kept[step] for step in steps]) for name, kept in rows.items()}  # noqa: E731
    states(at(few), few, scene, title, files[1])
    for file in files[2:]:
        animation(at(many), many, scene, title, file)
