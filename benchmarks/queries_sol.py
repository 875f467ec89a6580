"""Solver in the loop against questions: the loss of windows that no step has trained on, and the error of runs of 100 steps.

    python benchmarks/queries_sol.py runs/gn-0 runs/gn-1 runs/fo-0 ... -o sol-queries.md

For every checkpoint of every run: the mean loss of 24 windows of the training simulations, the same for all runs (drawn with
seed 0; a run of 39 steps has trained on 117 of 2,952 windows, one of 492 steps on 1,476, so a few may be among the 24), and
MAE(100) over the valid simulations. Of a first-order run (autograd), questions are those that CGE would have asked.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from dzhpc.models.weights import assign
from dzhpc.tasks import make_task
from dzhpc.tasks.sol import evaluation

WINDOWS, GOAL = range(1000, 1008), 56.1  # of three each; Adam's end in an earlier measurement


def measured(run: evaluation.Run, experiment: evaluation.Experiment, held: list, task) -> np.ndarray:
    """[checkpoints, 4]: step, questions, loss, MAE(100)."""
    simulations, rows = range(len(experiment.reference.valid.parameters)), []
    per_step = task.cost.bind + task.cost.query * task.engine.index.size
    for k, (_, state) in enumerate(run.checkpoints):
        assign(task.model, state.params, state.buffers)
        loss = np.mean([task.engine.bind(windows) for windows in held])
        error = np.mean([float(experiment.roll("valid", s, run, k, 100).capped(100)) for s in simulations])
        rows.append((state.step, per_step * state.step, loss, error))
    return np.array(rows)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path)
    p.add_argument("-o", "--out", required=True, type=Path, metavar="FILE")
    args = p.parse_args()
    torch.set_num_threads(1)
    runs = evaluation.read_all(args.runs)
    config = runs[0].config.model_copy(deep=True)
    config.run.seed, config.zo.estimator, config.model.weights = 0, "cge", None
    task = make_task(config, torch.device("cpu"))
    task.model.eval()
    held, experiment = [task.windows.drawn(k) for k in WINDOWS], evaluation.Experiment(config, torch.device("cpu"))
    lines = [
        f"| run | steps, questions | to {GOAL} | loss at the end | last five, mean | largest rise over the best of the last five "
        "| MAE(100), valid: best, at the end |",
        "|---" * 7 + "|",
    ]
    details = []
    for run in runs:
        found = measured(run, experiment, held, task)
        losses, there = found[:, 2], np.flatnonzero(found[:, 2] <= GOAL)
        rises = [losses[k] / losses[max(0, k - 5) : k].min() for k in range(1, len(losses))]
        first = f"{found[there[0], 1]:,.0f}" if len(there) else "not"
        lines.append(
            f"| {run.name} | {found[-1, 0]:.0f}, {found[-1, 1]:,.0f} | {first} | {losses[-1]:.1f} | {losses[-5:].mean():.1f} | "
            f"{max(rises, default=1):.2f} | {found[:, 3].min():.4f}, {found[-1, 3]:.4f} |"
        )
        print(lines[-1], flush=True)
        details.append(f"{run.name}: " + ", ".join(f"{s:.0f}: {loss:.1f} ({e:.4f})" for s, _, loss, e in found))
    args.out.write_text("\n".join([*lines, "", "Loss (MAE(100)) at each checkpoint:", "", *details]) + "\n")


if __name__ == "__main__":
    main()
