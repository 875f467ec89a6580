"""Verb: errors of corrected solvers in long runs. ``mpirun -n 2 python -m dzhpc.evaluate runs/sol runs/FO-SOL -o compare``"""

import argparse
import logging
import socket
import sys
from pathlib import Path

from dzhpc.errors import InputError
from dzhpc.job import device as devices
from dzhpc.job import log as metrics
from dzhpc.job.world import World, run_verb
from dzhpc.tasks.sol import evaluation, figures, results
from dzhpc.tasks.sol.evaluation import Experiment, Run
from dzhpc.tasks.sol.results import Method

log = logging.getLogger("dzhpc")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "dzhpc.evaluate", description="Mean errors of corrected solvers over the test simulations, and those of the solver alone."
    )
    p.add_argument("sources", nargs="+", metavar="RUN", help="run folder, checkpoint, or input file (SRC, the user's modules)")
    p.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    p.add_argument("--steps", help="mean errors over so many steps (default: 100,500, or what the reference has)")
    p.add_argument("--data-root", metavar="DIR", help="where the reference file lies (default: the input's data.root)")
    p.add_argument("--gif", action=argparse.BooleanOptionalAction, default=True, help="draw the animation (default: yes)")
    p.add_argument("--quiet", action="store_true", help="warnings and errors only")
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb on every rank; the exit code."""
    metrics.set_up_log(world.is_root, args.quiet)
    for source in args.sources:
        if source.endswith(".toml"):
            sys.path.insert(0, str(Path(source).resolve().parent))  # the user's own modules may lie beside the input
    runs = world.on_root(lambda: evaluation.read_all(args.sources, args.data_root))
    device = devices.choose(world.local_rank, runs[0].config.run.threads)
    ranks = world.gather((world.rank, socket.gethostname(), devices.describe(device), devices.uuid(device)))
    world.on_root(lambda: devices.check_binding(ranks, runs[0].config.run.share_gpu))
    with world.together():
        experiment = Experiment(runs[0].config, device)
        at = results.horizons(steps_of(args.steps), experiment.frames)
    runs = [run for run in runs if run.checkpoints]
    methods = compare(world, experiment, runs, at[-1])
    log.info("%s", world.on_root(lambda: write(experiment, methods, at, args.out, args.gif)))
    return 0


def steps_of(text: str | None) -> list[int] | None:
    """The numbers of --steps. Raises InputError."""
    try:
        return [int(part) for part in text.split(",")] if text is not None else None
    except ValueError:
        raise InputError(f"--steps {text}: expected numbers such as 100,500") from None


def compare(world: World, experiment: Experiment, runs: list[Run], horizon: int) -> list[Method]:
    """SRC and all methods over the test simulations. Collective."""
    count, steps = sum(len(run.checkpoints) for run in runs), min(horizon, experiment.frames - 1)
    if runs:
        log.info("choosing among %d checkpoints by the valid simulations", count)
        evaluation.choose(experiment, runs, steps, world.split)
    for run in runs:
        file = run.checkpoints[run.chosen][0]
        log.info("%s: %s, MAE(%d) %.4f over the valid simulations", run.name, file, horizon, run.scores[run.chosen])
    every = [None, *runs]
    return results.group(every, evaluation.measure(experiment, every, steps, world.split))


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


if __name__ == "__main__":
    run_verb(parser(), main)
