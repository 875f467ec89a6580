"""Corrected solvers side by side: the coarse solver alone and every method over the test simulations, tables and figures."""

import logging
from pathlib import Path

from dzhpc.config.paths import shown
from dzhpc.errors import InputError
from dzhpc.files import drawing, owned
from dzhpc.tasks.sol import evaluation, figures, results
from dzhpc.tasks.sol.evaluation import Experiment, Run, Split
from dzhpc.tasks.sol.results import Method

log = logging.getLogger("dzhpc")
MARK = "# Evaluation\n\n"  # by which tables of ours are known


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
        log.info("%s: %s, MAE(%d) %.4f over the valid simulations", run.name, shown(file), horizon, run.scores[run.chosen])
    every = [None, *runs]
    return results.group(every, evaluation.measure(experiment, every, steps, split))


def write(experiment: Experiment, methods: list[Method], at: list[int], out: Path, gif: bool) -> str:
    """Write tables and figures; the summary, and what was written. Raises InputError."""
    parameters, runs = experiment.reference.test.parameters.tolist(), [run for method in methods for run in method.runs if run]
    symbol = "re" if experiment.reference.staggered else "parameter"
    last = min(at[-1], experiment.frames - 1)
    names = ("evaluation.md", "evaluation.tsv", "errors.png", "states.png", *(["states.gif"] if gif else []))
    try:
        out.mkdir(parents=True, exist_ok=True)
        report, table, *pictures = owned.places(out, names, lambda path: owned.holds(path, MARK))
        shows = "\n\n".join(f"![{file.stem}]({file.name})" for file in pictures)
        chosen = f"## Checkpoints\n\n{results.choices(runs, at[-1])}\n" if runs else ""
        text = f"{MARK}{results.tables(methods, parameters, at, symbol)}\n\n{chosen}\n{shows}\n"
        report.write_text(text, encoding="utf-8", errors="backslashreplace")
        table.write_text(results.tsv(methods, parameters, at), encoding="utf-8", errors="backslashreplace")
        drawing.drawn(lambda: figures.draw(experiment, methods, last, pictures))
    except OSError as error:
        raise InputError(f"{shown(out)}: cannot be written ({error.strerror}); choose another folder with -o") from None
    files = [report, table, *(file for file in pictures if file.exists())]
    return f"{results.summary(methods, at)}\nwritten: {', '.join(map(shown, files))}"
