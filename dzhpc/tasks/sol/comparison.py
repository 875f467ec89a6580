"""Corrected solvers side by side: the coarse solver alone and every method over the test simulations, tables and figures."""

import logging
from pathlib import Path

from dzhpc.errors import InputError
from dzhpc.tasks.sol import evaluation, figures, results
from dzhpc.tasks.sol.evaluation import Experiment, Run, Split
from dzhpc.tasks.sol.results import Method

log = logging.getLogger("dzhpc")


def steps_of(text: str | None) -> list[int] | None:
    """The numbers of --steps. Raises InputError."""
    try:
        return [int(part) for part in text.split(",")] if text is not None else None
    except ValueError:
        raise InputError(f"--steps {text}: expected numbers such as 100,500") from None


def compare(experiment: Experiment, runs: list[Run], horizon: int, split: Split) -> list[Method]:
    """SRC and all methods over the test simulations. Collective."""
    count, steps = sum(len(run.checkpoints) for run in runs), min(horizon, experiment.frames - 1)
    if runs:
        log.info("choosing among %d checkpoints by the valid simulations", count)
        evaluation.choose(experiment, runs, steps, split)
    for run in runs:
        file = run.checkpoints[run.chosen][0]
        log.info("%s: %s, MAE(%d) %.4f over the valid simulations", run.name, file, horizon, run.scores[run.chosen])
    every = [None, *runs]
    return results.group(every, evaluation.measure(experiment, every, steps, split))


def write(experiment: Experiment, methods: list[Method], at: list[int], out: Path, gif: bool) -> str:
    """Write tables and figures; the summary, and what was written. Raises InputError."""
    parameters, runs = experiment.reference.test.parameters.tolist(), [run for method in methods for run in method.runs if run]
    symbol = "re" if experiment.reference.staggered else "parameter"
    last = min(at[-1], experiment.frames - 1)
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = figures.draw(experiment, methods, last, out, gif)
        pictures = "\n\n".join(f"![{file.stem}]({file.name})" for file in files)
        chosen = f"## Checkpoints\n\n{results.choices(runs, at[-1])}\n" if runs else ""
        tables = results.tables(methods, parameters, at, symbol)
        (out / "evaluation.md").write_text(f"# Evaluation\n\n{tables}\n\n{chosen}\n{pictures}\n")
        (out / "evaluation.tsv").write_text(results.tsv(methods, parameters, at))
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from None
    names = [out / "evaluation.md", out / "evaluation.tsv", *files]
    return f"{results.summary(methods, at)}\nwritten: {', '.join(map(str, names))}"
