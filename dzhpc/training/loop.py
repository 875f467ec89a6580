"""Ask and tell: training that the user's own loop holds in its hands. No MPI, and no files but those it is asked to write."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dzhpc.engines.pinned import Pinned
from dzhpc.errors import InputError, NumericalError
from dzhpc.files.checkpoint import State, load_checkpoint, save_checkpoint
from dzhpc.job.world import World
from dzhpc.method.arrays import to_tensor
from dzhpc.method.estimators import Partial, make_estimator
from dzhpc.training import checks
from dzhpc.training.active_set import Pattern
from dzhpc.training.asked import Asked, config_of
from dzhpc.training.budget import Budget
from dzhpc.training.distribution import Distribution
from dzhpc.training.first_look import look, sides
from dzhpc.training.state import TrainingState

log = logging.getLogger("dzhpc")


class Loop:
    """Minimises a loss that the user evaluates: ``thetas = loop.ask()``, then ``loop.tell(losses)``, again and again.

    theta0: an array [d], a dict of named arrays, or a torch.nn.Module, whose trainable parameters are then moved in place.
    estimator: "cge" (eq. 1), "rge", or a class of the user's own; mu: the length of a perturbation; optimizer: "sgd" or "adam".
    keys: further keys of an input, such as ``{"zo.q": 20, "optim.momentum": 0.9}``. Without them there is no momentum, no weight
    decay, no warm-up, and lr is constant. The steps are those that ``dzhpc.train`` makes of an objective with the same keys.
    check: let the first step ask up to six thetas more, by which CGE's estimate checks itself: a line of the log ``dzhpc`` says
    what it found, and what to change. Without them it says how far differences stand out of rounding.

    step: steps done. loss: at the theta with which the last of them began, NaN before. queries: losses told for these steps,
    without those of ``check``.
    Raises InputError for what cannot work, NumericalError for a loss that is not finite; +inf calls a perturbed theta infeasible.
    """

    def __init__(
        self,
        theta0: object,
        estimator: str = "cge",
        mu: float = 1e-3,
        optimizer: str = "sgd",
        lr: float = 1e-2,
        seed: int = 0,
        keys: Mapping[str, object] | None = None,
        check: bool = False,
    ):
        self.config = config_of(estimator, float(mu), optimizer, float(lr), seed, keys or {})
        if self.config.data.shards > 1:
            raise InputError("keys: data.shards: there is no batch to cut; leave the key out")
        if self.config.optim.name not in ("sgd", "adam"):
            raise InputError(f'optimizer = "{optimizer}": a loop is told losses, and has one learning rate; use "sgd" or "adam"')
        self._given, self._checks = theta0, check
        self._task = Asked(self.config, theta0, self._answer)
        self._estimator = make_estimator(self.config.zo, self.config.run.seed)
        self._world = World(alone=True)
        self._distribution = Distribution(self._world, self._task)
        self._pattern = Pattern(self._task, self._distribution.split, chosen=self._estimator.coordinates)
        self._budget = Budget(self._task, self._estimator, self._pattern)
        self._estimator.begin(self._task.engine)
        self._state = TrainingState(self._task, self._estimator, self._pattern, self._budget)
        self._schedule = self._state.schedule()
        self._pattern.redraw(0)
        self._units = self._estimator.units(self.index.size)
        if not self._units or self._estimator.step_length is not None:
            raise InputError(f'estimator = "{estimator}": a loop asks for losses; use cge, rge, or a class of your own')
        self.loss = float("nan")
        self._questions: list[Tensor] | None = None  # while they are written down, not answered
        self._answers: dict[bytes, float] = {}
        self._begin()

    @property
    def index(self):
        """The coordinates of theta, see :class:`dzhpc.method.coordinates.ParameterIndex`."""
        return self._task.engine.index

    @property
    def step(self) -> int:
        return self._state.step

    @property
    def queries(self) -> int:
        return self._budget.queries

    @property
    def theta(self) -> object:
        """theta now, in the shape in which theta0 was given; a Module itself."""
        if isinstance(self._given, nn.Module):
            return self._given
        blocks = {name: self._shown(p.detach().clone()) for name, p in self._task.model.named_parameters()}
        return blocks if isinstance(self._given, Mapping) else blocks["theta"]

    @property
    def learning_rate(self) -> float:
        """Of the next step alone: each step ends with the schedule's, so another rate has to be set before each."""
        return self._state.optimizer.param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._state.optimizer.param_groups[0]["lr"] = value

    def done(self, steps: int) -> bool:
        """Whether so many steps are made."""
        return self.step >= steps

    def ask(self, limit: int | None = None) -> np.ndarray | Tensor:
        """The thetas [P, d] whose losses the next ``tell`` brings: of a step the base first, then all perturbations.

        limit: at most so many; the rest comes with the next ``ask``. An array, or a tensor where theta0 was torch's. The same
        again until they are answered. :meth:`split` makes named blocks of them.
        """
        if limit is not None and (not isinstance(limit, (int, np.integer)) or limit < 1):
            raise InputError(f"ask(limit={limit!r}): expected a whole number of at least 1")
        if not len(self._rows):
            self._next_rows(limit)
        self._asked = self._rows if limit is None else self._rows[:limit]
        return self._shown(self._asked.clone())

    def tell(self, losses: Sequence[float]) -> None:
        """The losses [P] of the thetas that ``ask`` gave, in their order; they are minimised. The last ones of a step make it."""
        try:
            told = to_tensor(losses).double()
        except ValueError as error:
            raise InputError(f"tell() got {error}; expected a loss for each theta, to be minimised") from None
        if not len(self._asked) or told.shape != (len(self._asked),):
            raise InputError(
                f"tell() got losses {list(told.shape)} for the {len(self._asked)} thetas of ask(); expected one for each, to be "
                "minimised"
            )
        self._answers.update(zip(map(_name, self._asked), told.tolist(), strict=True))
        self._rows, self._asked = self._rows[len(told) :], self._rows[:0]
        self._told += len(told)
        if not len(self._rows):
            self._settle()

    def forget(self) -> None:
        """Ask the step under way anew: what was told of it counts no more, where the loss has become another one, say."""
        self._begin()

    def split(self, thetas: np.ndarray | Tensor) -> dict[str, np.ndarray | Tensor]:
        """Named blocks [P, ...] of thetas [P, d], as theta0 had them; the parameters of a Module."""
        sizes = [p.numel() for p in self.index.parameters]
        parts = torch.as_tensor(thetas).split(sizes, -1)
        shapes = zip(self.index.names, parts, self.index.parameters, strict=True)
        return {name: self._shown(part.reshape(*part.shape[:-1], *p.shape)) for name, part, p in shapes}

    def save(self, file: str | Path) -> None:
        """Write a checkpoint, in the middle of a step, too: what was told of whole units is kept. Raises CheckpointError."""
        self._state.partial = self._partial if self._partial.done.any() else None
        save_checkpoint(Path(file), self.state())
        self._state.partial = None

    def load(self, file: str | Path) -> None:
        """Go on from a checkpoint of a loop with the same keys and blocks. Raises CheckpointError."""
        self.restore(load_checkpoint(file), str(file))

    def state(self) -> State:
        """What a checkpoint holds."""
        return self._state.checkpoint()

    def restore(self, found: State, source: str) -> None:
        """:meth:`load`, of what :meth:`state` gave; source: what an error calls it."""
        checks.check_restart(found, source, self._task)
        self._state.restore(found)
        self._schedule = self._state.schedule()
        self._begin(found.partial)
        self._state.partial = None

    def _begin(self, partial: Partial | None = None) -> None:
        """Before a step; partial: what is known of it."""
        dtype = torch.empty(0, dtype=self.index.dtype).numpy().dtype
        self._partial = partial or Partial(np.zeros(self._units, dtype), np.zeros(self._units, bool))
        self._rows = self._asked = torch.zeros(0, self.index.size, dtype=self.index.dtype)
        self._piece, self._based, self._told = range(0), False, 0
        self._answers.clear()

    def _next_rows(self, limit: int | None) -> None:
        """Write down what the next units ask, and first what the base does."""
        todo = np.flatnonzero(~self._partial.done)
        start = int(todo[0]) if len(todo) else self._units
        stop = next((k for k in range(start, self._units) if self._partial.done[k]), self._units)
        if limit is not None:
            each = max(1, self._estimator.perturbations(self._units) // self._units)
            stop = min(stop, start + max(1, (limit - (not self._based)) // each))
        self._piece, self._questions = range(start, stop), []
        try:
            if not self._based:
                self._task.bind(self.step)
            self._evaluate()
            if self._checks and self.step == 0 and stop == self._units:
                sides(self._task.engine, self._estimator, self._pattern.coords)
            self._rows = torch.cat(self._questions)
        finally:
            self._questions = None

    def _evaluate(self) -> np.ndarray:
        coords = self._pattern.coords
        return self._estimator.evaluate(self._task.engine, coords, self.step, self._piece).cpu().numpy()

    def _settle(self) -> None:
        """All of the rows are answered: note the units, and make the step where none is left."""
        if not self._based:
            self._task.bind(self.step)
            self._based = True
        if len(self._piece):
            self._partial.values[self._piece.start : self._piece.stop] = self._evaluate()
            self._partial.done[self._piece.start : self._piece.stop] = True
        if not self._partial.done.all():
            return
        state, distribution = self._state, self._distribution
        lost = self._task.engine.lost
        distribution.assign(self._pattern.coords, self._estimator, self._partial)
        with Pinned(self._task.model, self.index.device).unchanged():  # the user's random numbers are none of ours
            loss, estimate = distribution.estimate(self._estimator, self.step, self._partial)
        self._task.engine.lost = lost
        try:
            checks.check_finite(self.step + 1, loss, estimate, self._estimator, distribution, _advice)
        except NumericalError:
            self._begin()  # who goes on all the same is asked again
            raise
        checks.check_changes(self._world, self.step + 1, estimate, self._estimator, self._task, distribution.shards)
        if self.step == 0:
            coords, engine = self._pattern.coords, self._task.engine
            log.info(look(engine, self._estimator, coords, loss, estimate, self.config, self._checks))
        state.update(self._pattern.coords, estimate)
        self._schedule.step()
        self._estimator.advance(estimate)
        state.step, self.loss = self.step + 1, loss
        self._budget.queries += self._budget.of_step(len(estimate))
        self._begin()

    def _answer(self, thetas: Tensor, step: int) -> Tensor:
        """The loss of thetas [P, d]: what was told; or, while questions are written down, nothing yet."""
        if self._questions is not None:
            self._questions.append(thetas)
            return torch.zeros(len(thetas), dtype=torch.float64)
        try:
            return torch.tensor([self._answers[_name(theta)] for theta in thetas], dtype=torch.float64)
        except KeyError:
            raise InputError(
                f"zo.estimator = {self.config.zo.estimator}: asks for what depends on losses of the same step; a loop cannot"
            ) from None

    def _shown(self, t: Tensor) -> np.ndarray | Tensor:
        first = next(iter(self._given.values()), None) if isinstance(self._given, Mapping) else self._given
        return t if isinstance(first, (Tensor, nn.Module)) else t.cpu().numpy()


def _advice(moved: bool = True) -> str:
    return "lower zo.mu or optim.lr, or look at the loss" if moved else "look at the loss, and at theta"


def _name(theta: Tensor) -> bytes:
    """What tells one theta [d] from another."""
    return hashlib.blake2b(theta.detach().cpu().numpy().tobytes(), digest_size=16).digest()
