"""Simulators: one step of the coarse solver for many states at once. PhiFlow, its fast twin, or the user's own function."""

from typing import Protocol

import torch
from torch import Tensor

from dzhpc.config import SolKeys, is_function
from dzhpc.engines.blackbox import BlackBox, check_company
from dzhpc.errors import InputError
from dzhpc.tasks.command import Program, function_of
from dzhpc.tasks.sol.reference import Reference
from dzhpc.tasks.sol.wake import Wake


class Simulator(Protocol):
    """States [N, ...] and parameters [N] -> next states [N, ...]. One that diverges gives NaN or infinity, which is no error."""

    name: str  # what errors and the log call it
    differentiable: bool  # whether autograd goes through it
    queries: int  # states advanced so far

    def __call__(self, states: Tensor, parameters: Tensor) -> Tensor:
        """One step."""


class OwnSimulator(BlackBox):
    """A function, numpy states [N, ...] and parameters float64 [N] -> next states [N, ...]: any Python code.

    Raises BlackBoxError as BlackBox does, InputError where the states that come back have another shape.
    """

    differentiable = False
    _state: torch.Size  # the shape of one

    def __call__(self, states: Tensor, parameters: Tensor) -> Tensor:
        """In as few calls as the limit allows."""
        self._state = states.shape[1:]
        return super().__call__(states, parameters.double()).to(states.dtype)

    def check(self, answers: Tensor, count: int) -> None:
        """Raise InputError for states of another shape; any numbers will do."""
        expected = [count, *self._state]
        if list(answers.shape) != expected:
            raise InputError(f"{self.name} gave {list(answers.shape)} for states {expected}; expected the same shape")


def make_simulator(
    task: SolKeys,
    reference: Reference | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
) -> Simulator:
    """The simulator of ``task.simulator`` or ``task.command`` for the states of a reference; None: for those of the wake's keys.

    Raises InputError for an unknown name, a missing library, or states that the simulator's grid does not fit.
    """
    key = task.box
    if task.command:
        if reference is None:
            raise InputError(f"{key}: is a simulator of its own; task.reference makes its reference")
        program = Program(task, {"state": reference.shape, "parameter": ()}, ["state"])
        ask = lambda states, parameters: program.arrays("state", states, states.shape[1:], parameter=parameters)  # noqa: E731
        return OwnSimulator(ask, program.limit, True, task.retries, key)
    if is_function(task.simulator):
        function = function_of(task, task.simulator, "task.simulator", threads)
        return OwnSimulator(function, task.batch_limit, True, task.retries, key)
    wake = Wake(task.resolution, task.radius)
    if reference is not None:
        check_wake(wake, reference, key)
    return make_wake(task.simulator, wake, device, dtype)


def make_wake(name: str, wake: Wake, device: torch.device, dtype: torch.dtype = torch.float32) -> Simulator:
    """The simulator ``projected`` or ``phiflow`` on one grid; PhiFlow takes a second to import."""
    if name == "phiflow":
        from dzhpc.tasks.sol.phiflow import PhiFlow

        return PhiFlow(wake, device)
    from dzhpc.tasks.sol.projected import Projected

    return Projected(wake, device, dtype)


def try_simulator(simulator: Simulator, task: SolKeys, states: Tensor, parameters: Tensor) -> None:
    """See :func:`dzhpc.engines.blackbox.check_company`; our own, and a program that gets one state at a time, know no company."""
    if isinstance(simulator, OwnSimulator) and (task.batched or not task.command):
        check_company(simulator, states, parameters, most=1e-3)


def check_wake(wake: Wake, reference: Reference, key: str) -> None:
    """Raise InputError for a reference of another grid or another rod."""
    if reference.shape != wake.shape:
        raise InputError(
            f"{key}: task.resolution = {wake.resolution} has states {list(wake.shape)}, the reference {list(reference.shape)}; "
            "set task.resolution to that of the reference"
        )
    if (radius := reference.about.get("radius", wake.radius)) != wake.radius:
        raise InputError(f"{key}: task.radius = {wake.radius:g}, the reference was made with {radius:g}")
