"""The user's own loss of a parameter vector: anything that maps thetas [P, d] to losses [P]."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dzhpc.config import Config, called, import_object, is_function, paths
from dzhpc.config.tasks import ObjectiveKeys
from dzhpc.engines.batch import changed
from dzhpc.engines.blackbox import Losses, Residuals
from dzhpc.engines.curvature import Curvature, Squares
from dzhpc.engines.network import checked
from dzhpc.engines.protocol import PLAIN
from dzhpc.errors import InputError
from dzhpc.method.arrays import to_tensor
from dzhpc.method.coordinates import ParameterIndex
from dzhpc.tasks.command import Program, Query, function_of
from dzhpc.tasks.protocol import Cost, Task

log = logging.getLogger("dzhpc")
ROUNDED = 0.25  # of mu: by how much a step may differ from it, theta being rounded, before that is said


class Blocks(nn.Module):
    """theta as named blocks, each a parameter; one block "theta" where the user gave a plain vector.

    Raises ValueError for blocks that hold no finite real numbers, or too narrow ones, and for names that no file could hold.
    """

    def __init__(self, initial: Mapping[str, object] | object):
        super().__init__()
        blocks = initial if isinstance(initial, Mapping) else {"theta": initial}
        for name, value in blocks.items():
            if not isinstance(name, str) or not name.strip(".") or "/" in name:
                raise ValueError(f"a block is called {name!r}; expected a name without /")
            try:
                tensor = to_tensor(value)
            except ValueError as error:
                raise ValueError(f"block {name} is {error}") from None
            if not torch.isfinite(tensor).all():
                raise ValueError(f"block {name} holds a number that is not finite")
            if tensor.is_floating_point() and tensor.itemsize < 4:  # theta + mu would be theta
                raise ValueError(f"block {name} is {str(tensor.dtype)[6:]}; expected float32 or float64")
            # not register_parameter: a block may well be called half or type, as methods of a Module are
            self._parameters[name] = nn.Parameter(tensor if tensor.is_floating_point() else tensor.double())
        if not any(p.numel() for p in self._parameters.values()):
            raise ValueError("it holds no number")


class ObjectiveEngine:
    """See :class:`dzhpc.engines.protocol.Engine`; over a user's loss, a chunk of coordinates in one call.

    function: (thetas [P, d], step) -> losses [P], numpy or torch as ``initial()`` gave; P <= batch_limit. A loss of +inf says
        that a perturbed theta is infeasible: its difference counts as 0, so the coordinate stays out of this step; that is
        counted, and named in a warning. Where it has a method ``residuals(thetas, step)`` -> [P, m], that alone is asked, and
        the loss is the mean of their squares; an infinite residual says infeasible.
    """

    base_bytes, peak_bytes, compile_s, environment = 0, 0, 0.0, PLAIN

    def __init__(self, function: Callable, model: Blocks, numpy: bool, batch_limit: int, retries: int, name: str):
        self.index = ParameterIndex.of(model)
        self.at_once = batch_limit
        ask = getattr(function, "residuals", None)
        self._has_residuals = callable(ask)
        kind, ask = (Residuals, ask) if self._has_residuals else (Losses, function)
        self._box = kind(lambda thetas: ask(thetas, self._step), batch_limit, numpy, retries, name)
        self._step: int | None = None
        self._base: Tensor | None = None  # the loss at theta, or its residuals [m]
        self.lost = 0  # infeasible thetas since the last bind
        self._infeasible: list[Tensor] = []  # of the parts of the last call
        self._said_rounded = False

    @property
    def queries(self) -> int:
        """Evaluations so far."""
        return self._box.queries

    def lost_queries(self, before: int) -> list[int]:
        """Which queries of the last call, before which there were so many, were infeasible."""
        return torch.cat(self._infeasible).nonzero().flatten().tolist() if self._infeasible else []

    def bind(self, step: int) -> float:
        """The loss at theta; later differences are at this step."""
        if self.lost > 1:
            log.warning("%d infeasible thetas in all in the step before", self.lost)
        self._step = step
        self.lost = 0
        self._base = self._ask(self._theta()[None])[0]
        return float(self._base.square().mean() if self._has_residuals else self._base)

    @property
    def curvature(self) -> Curvature:
        """See :class:`dzhpc.engines.protocol.Responding`. Raises InputError for a loss that is one number."""
        self._theta()
        if not self._has_residuals:
            raise InputError(
                f'{self._box.name}: gives one number, of which no curvature is known; optim.name = "gauss-newton" needs its '
                "residuals, a method residuals(thetas, step) -> [P, m], or a program that gives task.residuals of them"
            )
        return Squares(self._base.to(self.index.dtype), 2 / len(self._base))

    def unbind(self) -> None:
        """Forget the step."""
        self._step = None

    def cut(self, coords: np.ndarray) -> list[range]:
        """Chunks of positions: small enough to be shared out, never more than a call may hold."""
        size = max(1, min(self.at_once, -(-len(coords) // 16)))
        return [range(k, min(k + size, len(coords))) for k in range(0, len(coords), size)]

    def differences(self, coords, mu: float) -> Tensor:
        """l(theta + mu e_j) - l(theta) for each j -> [n]."""
        return self._for_each(coords, mu, self._changes, ())

    def responses(self, coords, mu: float) -> Tensor:
        """The change of the residuals for each j -> [n, m]."""
        return self._for_each(coords, mu, lambda *asked: self._responses(*asked).to(self.index.dtype), self._base.shape)

    def _for_each(self, coords, mu: float, changes: Callable, shape: tuple[int, ...]) -> Tensor:
        coords = torch.tensor(checked(coords), dtype=torch.int64)
        self.index.owner(coords.numpy())
        theta, values, self._infeasible = self._theta(), [], []
        for part in coords.split(self.at_once):
            thetas = theta.repeat(len(part), 1)
            thetas[torch.arange(len(part)), part] += mu
            self._look_at(part, thetas[torch.arange(len(part)), part] - theta[part], mu)
            values.append(changes(thetas, lambda k, part=part: self.index.describe(int(part[k]))))
        return torch.cat(values) if values else theta.new_zeros(0, *shape)

    def _look_at(self, coords: Tensor, steps: Tensor, mu: float) -> None:
        """Say once where theta + mu is rounded to something else, or to theta: the slope is then wrong, or 0."""
        apart = (steps.double() - mu).abs()
        if self._said_rounded or not apart.numel() or float(apart.max()) <= ROUNDED * abs(mu):
            return
        self._said_rounded, k = True, int(apart.argmax())
        dtype = str(steps.dtype)[6:]
        log.warning(
            "%s: mu = %g becomes a step of %g at %s, since theta is %s; raise zo.mu, scale theta, or give it in float64",
            *(self._box.name, mu, float(steps[k]), self.index.describe(int(coords[k])), dtype),
        )

    def directional(self, directions, mu: float) -> Tensor:
        """l(theta + mu u_i) - l(theta) for each direction [d] -> [q]."""
        theta, values, part, self._infeasible = self._theta(), [], [], []
        for u in directions:
            part.append(theta + mu * u)
            if len(part) == self.at_once:
                values.append(self._changes(torch.stack(part), lambda k: "a random direction"))
                part = []
        if part:
            values.append(self._changes(torch.stack(part), lambda k: "a random direction"))
        return torch.cat(values) if values else theta.new_zeros(0)

    def explain(self) -> str:
        """See :class:`dzhpc.engines.protocol.Engine`."""
        return f"the task's own loss, of at most {self.at_once} thetas in a call"

    def _theta(self) -> Tensor:
        if self._step is None:
            raise InputError("no step is bound: call engine.bind(step) first")
        return self.index.flatten(p.detach() for p in self.index.parameters)

    def _changes(self, thetas: Tensor, name: Callable[[int], str]) -> Tensor:
        """l(thetas) - l(theta) [P]; name: of the perturbation of a row."""
        if self._has_residuals:  # no losses are subtracted: the mean of d (2 r + d)
            changes = self._responses(thetas, name)
            found = (changes * (2 * self._base + changes)).mean(1)
        else:
            losses = self._ask(thetas)
            found = (losses - self._base).masked_fill(self._lost(losses.isposinf(), name), 0)
        return found.to(self.index.dtype)

    def _responses(self, thetas: Tensor, name: Callable[[int], str]) -> Tensor:
        """The residuals' changes [P, m] float64."""
        residuals = self._ask(thetas)
        infeasible = self._lost(residuals.isinf().any(1), name)
        return changed(residuals, self._base).masked_fill(infeasible[:, None], 0)

    def _lost(self, infeasible: Tensor, name: Callable[[int], str]) -> Tensor:
        """Take note of infeasible thetas [P]."""
        self._infeasible.append(infeasible)
        for k in infeasible.nonzero().flatten().tolist():
            if self.lost == 0 and not self._base.isinf().any():
                log.warning("%s: infeasible (+inf) when %s is perturbed: it stays out of this step", self._box.name, name(k))
            self.lost += 1
        return infeasible

    def _ask(self, thetas: Tensor) -> Tensor:
        return self._box(thetas).double()  # answers may have more digits than theta


class ProgramLoss:
    """The losses of thetas [P, d] by ``task.command``, a program for each of them; what it gets is theta times ``task.units``.

    With ``task.residuals`` it has a method ``residuals``, which alone is then asked.
    """

    def __init__(self, task: ObjectiveKeys, model: Blocks):
        self._blocks = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if unknown := set(task.units) - set(self._blocks):
            raise InputError(f"task.units: task.initial has no {', '.join(sorted(unknown))}; it has {', '.join(self._blocks)}")
        self._units = np.concatenate([np.full(math.prod(s), task.units.get(n, 1.0)) for n, s in self._blocks.items()])
        self.program = Program(task, self._blocks, list(self._blocks))
        self._shape = (task.residuals,) if task.residuals else ()
        if task.residuals:
            self.residuals = self.__call__

    def __call__(self, thetas: np.ndarray, step: int) -> np.ndarray:
        """Losses [P], or residuals [P, m]."""
        return self.program.many([self._query(theta.astype(np.float64) * self._units) for theta in thetas])

    def _query(self, numbers: np.ndarray) -> Query:
        ends = np.cumsum([math.prod(shape) for shape in self._blocks.values()])[:-1]
        parts = zip(self._blocks.items(), np.split(numbers, ends), strict=True)
        return Query({name: part.reshape(shape) for (name, shape), part in parts}, numbers, self._shape, np.inf)


def starting_point(task: ObjectiveKeys) -> object:
    """theta0 as ``task.initial`` has it: a table, a file, or what a function gives. Raises InputError."""
    if not isinstance(task.initial, str):
        return task.initial
    if is_function(task.initial):
        return called(f"task.initial = {task.initial}", import_object(task.initial, "task.initial"))
    path = paths.absolute(task.initial, f"task.initial = {task.initial}")
    try:
        with paths.opened(path) as file:
            return json.load(file) if path.suffix == ".json" else np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"task.initial = {task.initial}: cannot be read as .npy or .json ({reason})") from None


class ObjectiveTask(Task):
    """See :class:`dzhpc.tasks.Task`. An epoch is one step; it runs on the CPU, and the function may use what it likes."""

    steps_per_epoch = 1
    cost = Cost(evaluation=1)  # no box is named: a loss may well be flat somewhere

    def __init__(self, config: Config, device: torch.device):
        self.config, task = config, config.task
        if task.command:
            name, function = f"task.command = {task.command[0]}", None
            initial, source = starting_point(task), "task.initial"
        else:
            name = f"task.function = {task.function}"
            function = function_of(task, task.function, "task.function", config.run.threads, makes=True)
            asked = callable(function) or callable(getattr(function, "residuals", None))
            if not asked or not callable(getattr(function, "initial", None)):
                raise InputError(
                    f"{name}: needs initial() -> theta0 [d], and __call__(thetas [P, d], step) -> losses [P] or "
                    "residuals(thetas [P, d], step) -> [P, m]"
                )
            initial, source = called(f"{name}: initial()", function.initial), f"{name}: initial()"
        try:
            first = next(iter(initial.values())) if isinstance(initial, Mapping) else initial
            self.model = Blocks(initial)
        except (ValueError, StopIteration) as error:
            raise InputError(f"{source} gave what is no theta0 ({str(error) or 'no block'})") from None
        self._source, self._program = source, None
        limit, numpy = task.batch_limit, not isinstance(first, Tensor)
        if task.command:
            self._program = ProgramLoss(task, self.model)
            function, limit, numpy = self._program, self._program.program.limit, True
        self.engine = ObjectiveEngine(function, self.model, numpy, limit, task.retries, name)

    @property
    def lost(self) -> int:
        return self.engine.lost

    def made(self) -> dict[str, Mapping[str, Tensor]]:
        templates = self._program.program.made() if self._program else {}
        return {self._source: dict(self.model.named_parameters()), **templates}

    def bind(self, step: int) -> float:
        return self.engine.bind(step)

    def bind_for_scores(self, number: int) -> float:
        return self.engine.bind(number)

    def prunable(self) -> list[str]:
        return list(self.engine.index.names)

    def evaluate(self, parts: Sequence[int], step: int) -> np.ndarray:
        return np.array([[self.engine.bind(step), np.nan, 1.0] for _ in parts]).reshape(len(parts), 3)
