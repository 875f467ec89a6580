"""What a run would cost: queries, hours on 1, 2, 4, ... ranks, and memory, from a few timed chunks."""

import math
import os
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dzhpc.engines.pinned import Pinned
from dzhpc.errors import CheckpointError
from dzhpc.files.checkpoint import save_checkpoint
from dzhpc.files.metrics import Metrics
from dzhpc.job.log import duration
from dzhpc.method.estimators import Estimator, directions, make_estimator
from dzhpc.method.gauss_newton import TRIES
from dzhpc.method.scores import draw, lpr_from_scores, random_scores
from dzhpc.tasks import Task
from dzhpc.training import gauss_newton, stepmodel
from dzhpc.training.active_set import Pattern
from dzhpc.training.budget import Budget
from dzhpc.training.state import TrainingState
from dzhpc.training.stepmodel import RANKS, Network, Step, StepModel

MOST_ROWS = 10**5  # of a record that is written for a forecast


class Forecast:
    """What a run asks, and how long it takes on any number of ranks. A black box is asked for it; nothing else moves.

    Layers are taken at the mean ratio, since the true layer-wise ratios cost queries; the total |S| is the same up to rounding.
    network: between ranks. every: look at other numbers of shards, too.
    """

    def __init__(self, task: Task, network: Network = stepmodel.INFINIBAND, every: bool = True):
        self._task, config = task, task.config
        self._estimator: Estimator = make_estimator(config.zo, config.run.seed)
        self._estimator.begin(task.engine)
        chosen = self._estimator.coordinates()
        self.coords = mean_pattern(task) if chosen is None else chosen
        pattern = Pattern(task, None, chosen=self._estimator.coordinates)
        budget = Budget(task, self._estimator, pattern)
        self.per_step, interval = budget.of_step(len(self.coords)), config.eval.every_epochs * task.steps_per_epoch
        self.steps, self.ended_by = budget.foreseen(self.per_step + task.cost.evaluation / interval, pattern.ahead(0)[0])
        self._scorings = 1 + pattern.scorings(1, self.steps) if pattern.ahead(0)[0] else 0
        self.scores = pattern.ahead(0)[0] * self._scorings
        self._evaluations = -(-self.steps // interval)
        self.asked = self._evaluations * task.cost.evaluation
        self._newton = gauss_newton.forecast(task, len(self.coords)) if config.optim.name == "gauss-newton" else None
        trial = lambda: self.model.shards[self.given].base_s if config.optim.tries else 0.0  # noqa: E731
        solve = (lambda ranks: self._newton.seconds(ranks) + trial()) if self._newton else lambda ranks: 0.0
        self.model: StepModel = stepmodel.measure(task, self._estimator, self.coords, network, every and not self._newton, solve)
        self._evaluation_s, self.scoring_s = self._part_of_an_evaluation(), self._of_a_scoring()
        pattern.coords = self.coords
        self.checkpoint_s = self._of_a_checkpoint(TrainingState(task, self._estimator, pattern, budget))

    @property
    def given(self) -> int:
        """The input's number of shards."""
        return self._task.config.data.shards

    def run_s(self, step: Step) -> float:
        """Seconds of the run: its steps, scores, evaluations, and the checkpoints that are written every so many steps."""
        parts = math.ceil(self._task.evaluation_parts / step.ranks)
        fixed, shared = self.scoring_s
        scores = self._scorings * (fixed + shared / step.ranks)
        saved = self.steps // (self._task.config.checkpoint.every_steps or self.steps + 1) * self.checkpoint_s
        return self.steps * step.seconds + scores + saved + (self._evaluations + 1) * parts * self._evaluation_s

    def plot(self, path: Path) -> None:
        """Seconds a step against ranks for each number of shards, and what no waiting would give; the name's ending says how."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4.5), layout="constrained")
        axes = figure.subplots()
        for count in self.model.shards:
            axes.loglog(RANKS, [self.model.step(n, count).seconds for n in RANKS], marker=".", label=f"{count} shards")
        one = self.model.step(1, min(self.model.shards)).seconds
        axes.loglog(RANKS, [one / n for n in RANKS], "k:", label="ideal")
        axes.set(xlabel="ranks", ylabel="seconds a step", title=f"network: {self.model.network.name}")
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)

    def ranks_for(self, hours: float) -> Step | None:
        """The least number of ranks, a power of two, that ends within so many hours; None where none does."""
        found = (self.model.best(ranks) for ranks in RANKS)
        return next((step for step in found if self.run_s(step) <= 3600 * hours), None)

    def text(self, source: str | None = None, hours: float | None = None) -> str:
        """Queries, memory, engine, and the table; hours: within which the run should end. source: the input file."""
        task, index, shard = self._task, self._task.engine.index, self.model.shards[self.given]
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        cores, data = os.cpu_count() or 1, task.data_bytes / 2**20
        node = (cores * max(0.0, resident - data) + data) / 1024  # which holds the data once
        trials = f" and 1 to {TRIES} of {task.cost.query:,} for trials" if task.config.optim.tries else ""
        lines = [
            f"coordinates {index.size:,}, active |S| {len(self.coords):,}, "
            f"steps {self.steps:,} of {task.steps_per_epoch} an epoch{self.ended_by and f', ended by {self.ended_by}'}",
            f"queries: {self.per_step:,} a step{trials}, {self.scores:,} for scores, {self.asked:,} for evaluations, "
            f"{self.per_step * self.steps + self.scores + self.asked:,} in all",
            f"memory: parameters {index.size * index.parameters[0].element_size() / 2**20:.1f} MiB, "
            f"kept features {task.engine.peak_bytes / 2**20:.1f} MiB, process {resident:.0f} MiB a rank, of which data "
            f"{data:.0f} MiB that a node holds once, {node:.1f} GiB a node of {cores} cores",
            task.engine.explain(),
            f"timed: base pass {1e3 * shard.base_s:.1f} ms, {1e3 * self._query_s:.2f} ms a query"
            + (f", {1e3 * self.checkpoint_s:.1f} ms a checkpoint" if self.checkpoint_s else ""),
            *([self._newton.text] if self._newton else []),
            f"network: {self.model.network.name}",
            *self.table(),
        ]
        if hours is not None:
            lines.append(self._advice(source, hours))
        return "\n".join(lines)

    def table(self, ranks: Sequence[int] = RANKS) -> list[str]:
        """Lines of Markdown: seconds a step, efficiency, hours, core-hours, and what holds it back, by ranks."""
        given, several = self.given, len(self.model.shards) > 1
        head = f"| ranks | s a step, {given} shard{'s' if given > 1 else ''} | efficiency |"
        head += " best shards | s a step | efficiency |" if several else ""
        lines = [f"{head} run | core-hours | held back by |", "|---" * (9 if several else 6) + "|"]
        one, least = self.model.step(1, given), self.model.best(1)
        for n in ranks:
            plain = self.model.step(n, given)
            best = self.model.best(n) if several else plain
            row = [str(n), f"{plain.seconds:.3g}", f"{100 * self.model.efficiency(plain, one):.0f} %"]
            if several:
                row += [str(best.shards), f"{best.seconds:.3g}", f"{100 * self.model.efficiency(best, least):.0f} %"]
            hours = self.run_s(best) / 3600
            row += [duration(3600 * hours), f"{hours * n * self._task.config.run.threads:.3g}", best.bottleneck]
            lines.append(f"| {' | '.join(row)} |")
        return [*lines, "true ratios often keep more of the early, dearer layers; waiting in a queue is not in it"]

    @property
    def _query_s(self) -> float:
        """Of one perturbed query, or where there is none of the base pass."""
        shard = self.model.shards[self.given]
        return shard.work_s / max(1, self._estimator.perturbations(len(self.coords))) or shard.base_s

    def _part_of_an_evaluation(self) -> float:
        """Seconds; from those of a query where it would ask a black box."""
        task = self._task
        if task.cost.evaluation:
            cost, base_s = task.cost, self.model.shards[self.given].base_s
            each = self._query_s / cost.query if cost.query else base_s / cost.bind  # a query may do without the box
            return cost.evaluation / task.evaluation_parts * each
        with Pinned(task.model, task.engine.index.device).unchanged():
            return stepmodel.seconds(task, lambda: task.evaluate(range(1), 0))

    def _of_a_scoring(self) -> tuple[float, float]:
        """Seconds of a scoring that each rank spends, and that ranks share: base passes; directions, of which one is timed."""
        task, config, base_s = self._task, self._task.config, self.model.shards[self.given].base_s
        if not self._scorings or config.sparsity.scores != "zo-grasp":
            return (2 * base_s if self._scorings else 0.0), 0.0
        index = task.engine.index
        along = list(directions(index, range(1), 0, np.arange(index.size)))
        with Pinned(task.model, index.device).unchanged():
            task.bind(0)
            each = stepmodel.seconds(task, lambda: task.engine.directional(along, config.zo.mu), tries=1)
        return 2 * base_s * self.given, 2 * config.sparsity.q * each * self.given

    def _of_a_checkpoint(self, state: TrainingState) -> float:
        """Seconds, with the record half way, in a temporary folder; 0 where none is written for a number of steps."""
        if not self._task.config.checkpoint.every_steps:
            return 0.0
        rows = min(self.steps // 2, MOST_ROWS)
        try:
            with tempfile.TemporaryDirectory() as folder:
                metrics = Metrics(Path(folder) / "metrics.h5")
                metrics.train = np.zeros((rows, metrics.train.shape[1]))
                file, content = Path(folder) / "step.h5", state.checkpoint()
                return stepmodel.seconds(self._task, lambda: (metrics.flush(), save_checkpoint(file, content)))
        except (OSError, CheckpointError):
            return 0.0

    def _advice(self, source: str | None, hours: float) -> str:
        step = self.ranks_for(hours)
        if step is None:
            return f"within {hours:g} h: on no number of ranks up to {RANKS[-1]:,}"
        limit = duration(1.2 * self.run_s(step))
        shards = f" --set data.shards={step.shards}" if step.shards != self.given else ""
        sbatch = f"sbatch --ntasks={step.ranks} --time={limit} slurm/resnet20.sh{shards}"
        return f"within {hours:g} h: INPUT={source or 'inputs/resnet20.toml'} {sbatch}"


def mean_pattern(task) -> np.ndarray:
    """An S with as many coordinates of each layer as the mean ratio leaves; without a query."""
    config, index = task.config.sparsity, task.engine.index
    if config.ratio == 0:
        return np.arange(index.size)
    lpr = lpr_from_scores(random_scores(index, 0), index, task.prunable(), config.ratio, "signed", "")
    return draw(lpr, index, task.config.run.seed, 0)
