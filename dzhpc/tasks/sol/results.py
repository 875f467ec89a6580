"""Methods side by side: runs that differ in their seed are one method; tables of the mean error, and all of it in a TSV."""

import dataclasses
import statistics

import torch
from torch import Tensor

from dzhpc.config import FREE, frozen_changes
from dzhpc.errors import InputError
from dzhpc.files.drawing import cell
from dzhpc.tasks.sol.evaluation import Run
from dzhpc.tasks.sol.rollout import DIVERGED, Rollout

SRC = "SRC"  # the coarse solver alone
COLUMNS = ("method", "run", "seed", "step", "parameter", "steps", "mae", "diverged_at")


@dataclasses.dataclass
class Method:
    """Runs with one input but for the seed, and the rollout of each over the test simulations. SRC has None for a run."""

    name: str
    runs: list[Run | None]
    rollouts: list[Rollout]

    @property
    def errors(self) -> Tensor:
        """[seeds, S, steps], infinite from a divergence on."""
        return torch.stack([one.errors for one in self.rollouts])

    def mae(self, steps: int) -> Tensor:
        """[seeds, S], infinite where a simulation diverged."""
        return torch.stack([one.mae(steps) for one in self.rollouts])


def group(runs: list[Run | None], rollouts: list[Rollout]) -> list[Method]:
    """Methods in the order of their first run, named after the first. Raises InputError for two of one name."""
    methods: list[Method] = []
    for run, done in zip(runs, rollouts, strict=True):
        same = next((m for m in methods if run and all(other and _differ_in_seed(other, run) for other in m.runs)), None)
        if same is None:
            methods.append(Method(run.name if run else SRC, [], []))
        (same or methods[-1]).runs.append(run)
        (same or methods[-1]).rollouts.append(done)
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"several methods would be called {name}; rename a run folder, or evaluate them one by one")
    return methods


def _differ_in_seed(a: Run, b: Run) -> bool:
    return [key for key, _, _ in frozen_changes(a.config, b.config, FREE)] == ["run.seed"]


def horizons(asked: list[int] | None, frames: int) -> list[int]:
    """Numbers of steps for the mean errors: 100 and 500, or as many as ``frames`` states allow, or those that are asked for.

    As the paper counts, a reference of 500 frames is one of 500 steps, though the last is the 499th from the first.
    Raises InputError for more.
    """
    if asked is None:
        return sorted({min(100, frames), min(500, frames)})
    for steps in asked:
        if not 1 <= steps <= frames:
            raise InputError(f"--steps {steps}: expected 1 to {frames}, the frames of the reference")
    return sorted(set(asked))


def tables(methods: list[Method], parameters: list[float], at: list[int], symbol: str) -> str:
    """Markdown: the means of every method; the error of every simulation for each horizon; what the errors are."""
    parts = [summary(methods, at)]
    parts += [f"## MAE({steps})\n\n{_by_simulation(methods, parameters, steps, symbol)}" for steps in at]
    return "\n\n".join([*parts, NOTES])


NOTES = f"""MAE(k): mean |difference| to the reference over all entries of a state and over k steps, or as many as it has.
± is the standard deviation (n - 1), over simulations of their mean over seeds, and over seeds of their mean over simulations.
A simulation has diverged once its error is not finite or above {DIVERGED:g} times the rms of its reference. It is in no mean;
(4 of 5) says of how many that is the mean."""


def summary(methods: list[Method], at: list[int]) -> str:
    """Markdown: a method a row, means and spreads for each horizon."""
    columns = ["method", "seeds", *(text for k in at for text in (f"MAE({k})", "± simulations", "± seeds")), "diverged"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for method in methods:
        cells = [cell(method.name), str(len(method.runs)) if method.runs[0] else ""]
        for steps in at:
            values = method.mae(steps)
            cells += [_mean(values), _spread(values.mean(0)), _spread(_finite_means(values))]
        diverged = int(torch.isinf(method.mae(at[-1])).sum())
        lines.append(f"| {' | '.join([*cells, f'{diverged} of {values.numel()}'])} |")
    return "\n".join(lines)


def _by_simulation(methods: list[Method], parameters: list[float], steps: int, symbol: str) -> str:
    columns = ["method", "seed", "checkpoint", *(f"{symbol} {p:.10g}" for p in parameters), "mean"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for method in methods:
        for run, values, done in zip(method.runs, method.mae(steps), method.rollouts, strict=True):
            cells = (
                [cell(method.name), str(run.config.run.seed), f"step {run.state.step}"] if run else [cell(method.name), "", ""]
            )
            pairs = zip(values.tolist(), done.diverged.tolist(), strict=True)
            cells += [f"diverged at step {k}" if value == torch.inf else f"{value:.4f}" for value, k in pairs]
            lines.append(f"| {' | '.join([*cells, _mean(values)])} |")
    return "\n".join(lines)


def _finite(values: Tensor) -> list[float]:
    return values[torch.isfinite(values)].tolist()


def _finite_means(values: Tensor) -> Tensor:
    """The mean of each row, diverged simulations left out; infinite where none is left."""
    return torch.tensor([statistics.fmean(row) if (row := _finite(one)) else torch.inf for one in values])


def _mean(values: Tensor) -> str:
    finite = _finite(values)
    left_out = f" ({len(finite)} of {values.numel()})" if len(finite) < values.numel() else ""
    return (f"{statistics.fmean(finite):.4f}" if finite else "diverged") + left_out


def _spread(values: Tensor) -> str:
    finite = _finite(values)
    return f"{statistics.stdev(finite):.4f}" if len(finite) > 1 else ""


def choices(runs: list[Run], steps: int) -> str:
    """Markdown: the score of every checkpoint, the best in bold, a run a row."""
    lines = ["| run | checkpoint: score |", "|---|---|"]
    for run in runs:
        cells = [f"{state.step}: {score:.4f}" for (_, state), score in zip(run.checkpoints, run.scores, strict=True)]
        cells[run.chosen] = f"**{cells[run.chosen]}**"
        lines.append(f"| {cell(run.name)} | {', '.join(cells)} |")
    text = f"The lowest MAE({steps}) over the *valid* simulations chooses; a step after a divergence counts with the bound."
    return "\n".join([*lines, "", text])


def tsv(methods: list[Method], parameters: list[float], at: list[int]) -> str:
    """A line for every run, simulation and horizon, in full precision; diverged_at 0: it did not."""
    lines = ["\t".join(COLUMNS)]
    for method in methods:
        for run, done in zip(method.runs, method.rollouts, strict=True):
            about = (" ".join(run.name.split()), run.config.run.seed, run.state.step) if run else ("", "", "")
            for s, parameter in enumerate(parameters):
                for steps in at:
                    found = (float(done.mae(steps)[s]), int(done.diverged[s]))
                    lines.append("\t".join(map(str, (" ".join(method.name.split()), *about, parameter, steps, *found))))
    return "\n".join(lines) + "\n"
