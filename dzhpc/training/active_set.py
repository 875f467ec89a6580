"""The active coordinate set S over a run: scored once or again, drawn, kept or redrawn (Algorithms 1 and 2)."""

import logging
from collections.abc import Callable

import numpy as np
import torch

from dzhpc.config import paths
from dzhpc.engines.pinned import Pinned
from dzhpc.engines.pinned import seed as pinned_seed
from dzhpc.errors import InputError
from dzhpc.files.lpr import load_lpr
from dzhpc.method.scores import LPR, Split, adapted, best, draw, fo_grasp, lpr_from_scores, random_scores, running, zo_grasp
from dzhpc.method.seeds import derive
from dzhpc.models.identity import model_sha256
from dzhpc.training.shards import Shards

log = logging.getLogger("dzhpc")


class Pattern:
    """Which coordinates are active at which step.

    dynamic: S is redrawn by the LPR at every interval (ours); static: S stays what the scores keep (M2); regrasp: scored anew at
    every interval (M1); adaptive: redrawn at every step, a share by what coordinates have given. All of it is a function of
    (seed, step) and theta, so every rank count gives the same S.
    attempt: calls what each rank does by itself before it takes part in ``split``, where that may fail on some ranks only.
    chosen: of each step, where the estimator does that (:meth:`dzhpc.method.estimators.Estimator.coordinates`).
    """

    def __init__(
        self,
        task,
        split: Split,
        attempt: Callable[[Callable], float] = lambda ask: ask(),
        chosen: Callable[[], np.ndarray | None] = lambda: None,
    ):
        self._task, self._split, self._attempt, self._chosen = task, split, attempt, chosen
        self._config, self._seed = task.config.sparsity, task.config.run.seed
        self._mu = task.config.zo.mu
        self._adapts = self._config.pattern == "adaptive" and self._config.ratio > 0
        epochs = 0 if self._adapts else self._config.redraw_epochs
        self._interval = self._config.redraw_steps or epochs * task.steps_per_epoch or 1
        self.lpr: LPR | None = None
        self.coords: np.ndarray | None = None
        self.queries = 0  # spent on scores
        index = task.engine.index
        self.sizes = torch.zeros(index.size, dtype=torch.float64) if self._adapts else None  # what coordinates have given [d]

    def restore(self, lpr: LPR | None, coords: np.ndarray, sizes: torch.Tensor | None = None) -> None:
        """Continue with a checkpoint's ratios, set, and what its coordinates have given."""
        self.lpr, self.coords = lpr, coords
        self.sizes = sizes if self._adapts else None

    def note(self, gradient: torch.Tensor, curvature: torch.Tensor | None) -> None:
        """What the coordinates of S have given in a step: ghat [n], and diag H [n] where it is known; equal on all ranks."""
        if not self._adapts:
            return
        given = gradient.detach().cpu().double().square()
        if self._config.measure == "decrease":
            given = given / curvature.double().clamp_min(1e-30)
        self.sizes = running(self.sizes, self.coords, given)

    def due(self, step: int) -> bool:
        """Whether a new S belongs to this step."""
        if self.coords is None or self._chosen() is not None:
            return True
        return self._config.ratio > 0 and self._config.pattern != "static" and step % self._interval == 0

    def scorings(self, step: int, last: int) -> int:
        """How often scores will be made after step ``step``, until step ``last``."""
        again = self._config.ratio > 0 and self._config.pattern == "regrasp"
        return max(0, (last - 1) // self._interval - (step - 1) // self._interval) if again else 0

    def ahead(self, step: int) -> tuple[int, int]:
        """What the scores of this step will ask, and how many coordinates its S has at most."""
        index, ratio = self._task.engine.index, self._config.ratio
        if (chosen := self._chosen()) is not None:
            return 0, len(chosen)
        if self.coords is not None and not (self.due(step) and self._scores_anew):
            return 0, len(self.coords)
        if ratio == 0:
            return 0, index.size
        layers = self._task.prunable()
        prunable = sum(len(index.range(name)) for name in layers)
        most = index.size - prunable + round((1 - ratio) * prunable) + len(layers)  # at least one is kept in each
        return 0 if self._config.lpr else self.score_queries, min(most, index.size)

    @property
    def score_queries(self) -> int:
        """What scoring once asks; both RGEs bind."""
        bind, query = self._task.cost.bind, self._task.cost.query
        return {"zo-grasp": 2 * (bind + self._config.q * query), "fo-grasp": bind, "random": 0}[self._config.scores]

    @property
    def _scores_anew(self) -> bool:
        """Whether a redraw needs ratios first."""
        return self._config.ratio > 0 and (self.lpr is None or self._config.pattern == "regrasp")

    def redraw(self, step: int) -> None:
        """Make the S of this step; score first where scores are due. Collective: every rank calls it."""
        index, number = self._task.engine.index, step // self._interval
        if (chosen := self._chosen()) is not None:
            self.coords = chosen
            return
        if self._scores_anew:
            self.lpr = read_lpr(self._task) if self._config.lpr else self.score(number)
        if self._adapts:
            self.coords = adapted(self.lpr, index, self._seed, number, self.sizes, self._config.share)
        elif self.lpr is not None and self._config.pattern != "dynamic":
            self.coords = best(self.lpr, index)
        else:
            self.coords = draw(self.lpr, index, self._seed, number)
        if self._config.target == "weights":
            self._prune_weights()

    def score(self, number: int = 0) -> LPR:
        """Scores, and the ratios that they give, at the present theta; BatchNorm's running statistics stay as they are."""
        config, task = self._config, self._task
        index, seed = task.engine.index, derive(self._seed, "scores", number)
        with Pinned(task.model, index.device).unchanged():
            scores = self._scores(number, seed)
        self.queries += self.score_queries
        attrs = {"scores": config.scores, "mu": self._mu, "q": config.q, "seed": self._seed}
        if config.scores == "fo-grasp" and config.temperature != 1:
            attrs["temperature"] = config.temperature
        return lpr_from_scores(scores, index, self._task.prunable(), config.ratio, config.rule, model_sha256(task.model), attrs)

    def _scores(self, number: int, seed: int) -> torch.Tensor:
        config, task = self._config, self._task
        if config.scores == "zo-grasp":
            log.info("scoring weights: ZO-GraSP, %d queries", self.score_queries)
            return self._by_queries(number, seed)
        if config.scores == "fo-grasp":
            return fo_grasp(task.engine, lambda: task.bind_for_scores(number), config.temperature)
        return random_scores(task.engine.index, seed)

    def _by_queries(self, number: int, seed: int) -> torch.Tensor:
        """ZO-GraSP; of a batch in shards the slopes are the mean of theirs, added in order."""
        task, config, shards = self._task, self._config, Shards(self._task)
        if shards.count == 1:

            def bind() -> float:
                pinned_seed(derive(self._seed, "score masks", number))  # dropout's, the same at theta and at theta + mu g
                return self._attempt(lambda: task.bind_for_scores(number))

            return zo_grasp(task.engine, bind, config.q, self._mu, seed, self._split)

        def in_shards(q: int, evaluate: Callable[[range], np.ndarray]) -> np.ndarray:
            bound = None

            def of_shards(mine: range) -> np.ndarray:
                nonlocal bound
                slopes = []
                for unit in mine:
                    shard, k = divmod(unit, q)
                    if shard != bound:
                        pinned_seed(derive(self._seed, "shard scores", number, shard))  # whoever binds it, after whatever
                        task.bind_for_scores(number, shard)
                        bound = shard
                    slopes.append(evaluate(range(k, k + 1)))
                return np.concatenate([evaluate(range(0)), *slopes])

            return shards.average(self._split(shards.count * q, of_shards).reshape(shards.count, q))

        return zo_grasp(task.engine, lambda: None, config.q, self._mu, seed, in_shards)

    def _prune_weights(self) -> None:
        index = self._task.engine.index
        mask = torch.zeros(index.size, dtype=torch.bool)
        mask[torch.from_numpy(self.coords)] = True
        with torch.no_grad():
            for p, keep in zip(index.parameters, index.split(mask).values(), strict=True):
                p.mul_(keep.to(p.device))


def read_lpr(task) -> LPR:
    """``sparsity.lpr``. Raises InputError for a file of another model, ratio, rule, or choice, or without the scores needed."""
    config, index = task.config.sparsity, task.engine.index
    lpr, scores = load_lpr(paths.absolute(config.lpr, f'sparsity.lpr = "{config.lpr}"'))
    if lpr.model_sha256 != model_sha256(task.model) or not set(lpr.layers) <= set(index.names):
        raise InputError(f"sparsity.lpr = {config.lpr}: made for another model; make it anew with `python -m dzhpc.prune`")
    if lpr.attrs["sparsity"] != config.ratio:
        raise InputError(
            f"sparsity.lpr = {config.lpr}: made for sparsity {lpr.attrs['sparsity']}, now sparsity.ratio = {config.ratio}"
        )
    if (rule := lpr.attrs["rule"]) != config.rule:
        raise InputError(f'sparsity.lpr = {config.lpr}: made by the rule "{rule}", now sparsity.rule = "{config.rule}"')
    if lpr.layers != (wanted := list(task.prunable())):
        raise InputError(
            f'sparsity.lpr = {config.lpr}: prunes {len(lpr.layers)} parameters, of which sparsity.prune = "{config.prune}" and '
            f"model.trainable make {len(wanted)}; make it anew with `python -m dzhpc.prune`"
        )
    if scores:
        parameters = zip(index.names, index.parameters, strict=True)
        lpr.scores = index.flatten(scores.get(name, torch.zeros(p.shape)).to(p) for name, p in parameters)
    elif config.pattern == "static":
        raise InputError(
            f'sparsity.lpr = {config.lpr}: holds no scores, which pattern = "static" needs; use `python -m dzhpc.prune`'
        )
    return lpr
