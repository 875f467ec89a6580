"""Fine solvers: one reference trajectory after another, frame by frame, so that a job may stop and go on in the middle."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from dzhpc.config import SolKeys
from dzhpc.engines.blackbox import BlackBox
from dzhpc.errors import InputError, NumericalError
from dzhpc.tasks.command import function_of
from dzhpc.tasks.sol.simulators import make_wake
from dzhpc.tasks.sol.wake import DT, LENGTH, SPEED, Wake


@dataclasses.dataclass
class Simulation:
    """How far one simulation has come: the number of states so far, the first one and those of the warm-up included.

    kept: coarse states [F, ...] float32 of the last frames, the first of them filled. now: the solver's state, to go on from.
    """

    parameter: float
    frames: int = 0
    kept: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    now: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))


class Solver(Protocol):
    """Makes simulations of ``frames`` states after ``warm_up`` others."""

    about: dict[str, object]  # all constants that decide the states

    def advance(self, simulation: Simulation) -> Iterator[None]:
        """Go on to the end; between two yields the simulation may be saved. Raises NumericalError for NaN."""


class WakeSolver:
    """The wake on a grid ``task.factor`` times finer than the coarse one; the states are averages on the coarse grid.

    One simulation at a time: the bits of each are its own, however many there are and whoever makes them.
    """

    def __init__(self, task: SolKeys, device: torch.device):
        self._wake, self._device = Wake(task.resolution * task.factor, task.radius), device
        self._task, self._step = task, make_wake(task.simulator, self._wake, device)
        self.about = {
            "staggered": True, "simulator": task.simulator, "resolution": task.resolution, "factor": task.factor,
            "radius": task.radius, "length": LENGTH, "speed": SPEED, "dt": DT, "viscosity": "1e4 / parameter",
            "warm_up": task.warm_up, "frames": task.frames,
        }  # fmt: skip

    @torch.no_grad()
    def advance(self, simulation: Simulation) -> Iterator[None]:
        """See :class:`Solver`."""
        warm_up, frames, coarse = self._task.warm_up, self._task.frames, Wake(self._task.resolution).shape
        if simulation.frames == 0:
            simulation.kept = np.zeros((frames, *coarse), np.float32)
            simulation.now = self._wake.initial().numpy()
        state = torch.from_numpy(simulation.now)[None].to(self._device)
        parameters = torch.tensor([simulation.parameter], dtype=torch.float64, device=self._device)
        while simulation.frames < warm_up + frames:
            if simulation.frames > 0:
                state = self._step(state, parameters)
            simulation.now = state[0].cpu().numpy()
            check_finite(simulation.now, simulation.parameter, simulation.frames)
            if simulation.frames >= warm_up:
                simulation.kept[simulation.frames - warm_up] = self._wake.down(state, self._task.factor)[0].cpu().numpy()
            simulation.frames += 1
            yield


class OwnSolver(BlackBox):
    """The user's own: parameter -> states [warm_up + frames, ...] of a whole simulation. Raises as BlackBox does."""

    def __init__(self, task: SolKeys):
        function, name = function_of(task, task.reference, "task.reference", 1), f"task.reference = {task.reference}"
        super().__init__(lambda p: np.asanyarray(function(float(p[0])))[None], 1, True, task.retries, name)
        self._warm_up, self._frames = task.warm_up, task.frames
        self.about = {"staggered": False, "reference": task.reference, "warm_up": task.warm_up, "frames": task.frames}

    def advance(self, simulation: Simulation) -> Iterator[None]:
        """See :class:`Solver`; all of a simulation is one call."""
        states = self(torch.tensor([simulation.parameter], dtype=torch.float64))[0].numpy().astype(np.float32)
        for frame, state in enumerate(states):
            check_finite(state, simulation.parameter, frame)
        simulation.kept, simulation.frames = states[self._warm_up :], len(states)
        yield

    def check(self, answers: torch.Tensor, count: int) -> None:
        """Raise InputError for another number of states, or states that are none."""
        frames = self._warm_up + self._frames
        if answers.ndim < 3 or answers.shape[1] != frames:
            raise InputError(
                f"{self.name} gave {list(answers.shape[1:])}; expected [{frames}, ...], task.warm_up + task.frames states"
            )


def make_solver(task: SolKeys, device: torch.device) -> Solver:
    """The solver for the reference of ``task``. Raises InputError for keys that do not fit each other."""
    own = task.is_own
    if own != (task.reference is not None):
        raise InputError(
            f'task.reference: needed for {task.box}: "package.module:function", a parameter -> its states'
            if own
            else f"task.reference = {task.reference}: belongs to a task.simulator of your own; {task.simulator} has its own"
        )
    return OwnSolver(task) if own else WakeSolver(task, device)


def check_finite(state: np.ndarray, parameter: float, frame: int) -> None:
    """Raise NumericalError that names parameter and frame."""
    if not np.isfinite(state).all():
        raise NumericalError(
            f"the reference simulation of parameter {parameter:g} is not finite at frame {frame}: look at the solver"
        )
