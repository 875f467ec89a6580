"""A function that can only be asked: batched, counted, retried, its answers checked; and a loss that ends in one."""

import logging
import os
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dzhpc.errors import BlackBoxError, InputError, NumericalError, leave_fork, message_of
from dzhpc.method.arrays import to_tensor

log = logging.getLogger("dzhpc")
LONGEST_WAIT = 30  # seconds between two attempts
COMPANY = 1e-4  # of the answers' spread: what rounding may change in float32, where a call holds more or fewer of them


class BlackBox:
    """Answers [N, ...] of ``function`` to inputs [N, ...], in calls of at most ``batch_limit``; no gradient is ever taken.

    function: gets and gives torch tensors, or numpy arrays where ``numpy`` is true; a copy in each call, that it may write into.
        Several inputs are as many arguments. It needs a time limit of its own: a call that never returns holds up the run.
    retries: how often a call that raises is made again, after 1, 2, 4, ... seconds, at most LONGEST_WAIT.
    name: what errors call the function.

    ``queries`` counts inputs that were answered. Raises BlackBoxError for a call that raises once more than ``retries`` times, or
    that leaves by what is no Exception, such as sys.exit; InputError for answers of a wrong shape or complex ones, NumericalError
    for NaN and infinity.
    """

    def __init__(
        self, function: Callable, batch_limit: int = 1024, numpy: bool = False, retries: int = 0, name: str | None = None
    ):
        if batch_limit < 1:
            raise InputError(f"batch_limit = {batch_limit}: expected at least 1")
        self._function, self._limit, self._numpy, self._retries = function, batch_limit, numpy, retries
        self.name = name or getattr(function, "__name__", type(function).__name__)
        self._shape: torch.Size | None = None  # of one answer
        self.queries = 0

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        """In as few calls as the limit allows."""
        parts = zip(*(x.detach().split(self._limit) for x in inputs), strict=True)
        return torch.cat([self._ask(*part) for part in parts])

    def check(self, answers: Tensor, count: int) -> None:
        """Raise InputError or NumericalError for answers to ``count`` inputs that cannot be right."""
        if answers.ndim == 0 or len(answers) != count:
            raise InputError(f"{self.name} gave {list(answers.shape)} for {count} inputs; expected an answer to each")
        if self._shape is not None and answers.shape[1:] != self._shape:
            raise InputError(f"{self.name} gave {list(answers.shape)}; its earlier answers were {list(self._shape)} each")
        if not torch.isfinite(answers).all():
            raise NumericalError(f"{self.name} gave answers that are not finite")

    def _ask(self, *inputs: Tensor) -> Tensor:
        given = self._attempt(inputs)
        try:
            answers = to_tensor(given)  # a copy: the function may fill the same array again
        except ValueError as error:
            raise InputError(f"{self.name} gave {error}; expected an array of numbers") from None
        self.check(answers, len(inputs[0]))
        self._shape = answers.shape[1:]
        self.queries += len(inputs[0])
        return answers.to(inputs[0].device)

    def _attempt(self, inputs: tuple[Tensor, ...]):
        """What the function gives, once it does. Raises BlackBoxError."""
        process = os.getpid()
        for attempt in range(self._retries + 1):
            try:
                given = self._function(*map(self._copy, inputs))
            except BaseException as error:  # the user's code, or a server, may raise anything
                if os.getpid() != process:
                    leave_fork(error)
                if isinstance(error, KeyboardInterrupt):
                    raise
                message = f"{self.name}: {message_of(error)}"
                if attempt == self._retries or not isinstance(error, Exception):
                    raise BlackBoxError(f"{message} (attempt {attempt + 1})" if attempt else message) from error
            else:
                if os.getpid() != process:
                    leave_fork()
                return given
            wait = min(2**attempt, LONGEST_WAIT)
            log.warning("%s; asking again in %d s", message, wait)
            time.sleep(wait)

    def _copy(self, inputs: Tensor) -> Tensor | np.ndarray:
        if self._numpy:
            return inputs.to("cpu", copy=True, memory_format=torch.contiguous_format).numpy()
        return inputs.clone()


class Residuals(BlackBox):
    """A black box that gives m residuals to each theta [P, m]; an infinite one says that a theta is infeasible."""

    def check(self, answers: Tensor, count: int) -> None:
        if answers.ndim != 2 or len(answers) != count or not answers.shape[1]:
            raise InputError(f"{self.name}: residuals() gave {list(answers.shape)}; expected [{count}, m], a row a theta")
        if self._shape is not None and answers.shape[1:] != self._shape:
            raise InputError(f"{self.name}: residuals() gave {list(answers.shape)}; before it was m = {self._shape[0]}")


class Losses(BlackBox):
    """A black box that gives one loss to each theta. Which of them is no number, the trainer finds and names."""

    def check(self, answers: Tensor, count: int) -> None:
        if answers.shape != (count,):
            raise InputError(f"{self.name}: gave losses {list(answers.shape)}; expected [{count}], one a theta")


class BlackBoxLoss:
    """mean over the batch of criterion(box(outputs), targets), for many perturbed outputs at once.

    criterion: (answers [N, ...], targets [N, ...]) -> losses [N]. ``answered``: what the box said last [P, B, ...].
    """

    answered: Tensor | None = None

    def __init__(self, box: BlackBox, criterion: Callable[[Tensor, Tensor], Tensor]):
        self._box, self._criterion = box, criterion

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of outputs [B, ...] -> scalar."""
        return self.many(outputs[None], targets)[0]

    def many(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The losses of outputs [P, B, ...], each against targets [B, ...] -> [P] float64."""
        p = len(outputs)
        answers = self._box(outputs.flatten(0, 1))
        losses = self._criterion(answers, targets.repeat(p, *[1] * (targets.ndim - 1)))
        if losses.shape != (p * outputs.shape[1],):
            raise InputError(f"the criterion gave {list(losses.shape)} for {len(answers)} answers; expected a loss for each")
        self.answered = answers.unflatten(0, (p, -1))
        return losses.double().view(p, -1).mean(1)


@torch.no_grad()
def check_company(box: BlackBox, *inputs: Tensor, most: float) -> None:
    """Ask a black box about its inputs [N, ...] together, then about each half: no answer may depend on what else is in a call.

    Perturbed and unperturbed ones are asked together, in calls that depend on the number of ranks. most: what answers may change
    by, of how far they are from each other (r.m.s.); above that raises InputError, what is beyond rounding is a warning.
    """
    half, asked = len(inputs[0]) // 2, box.queries
    if not half:
        return
    together = box(*inputs).double()
    spread = float(_finite(together - together.mean(0)).square().mean().sqrt())
    apart = torch.cat([box(*(x[part] for x in inputs)) for part in (slice(half), slice(half, None))]).double()
    again, what = box(*inputs).double() if _rms(apart, together) > most * spread else together, "what else is in the call"
    box.queries = asked
    if _rms(again, together) > most * spread:
        apart, what = again, "each call (dropout, or other random numbers)"
    error = _rms(apart, together)
    if error <= min(most, COMPANY) * spread:
        return
    text = f"{box.name}: answers change, by {error / (spread or error):.0e} of their spread, with {what}"
    if error > most * spread:
        raise InputError(f"{text}; each must follow from its own input alone: is a network in training mode?")
    log.warning("%s; bits may depend on the number of ranks", text)


def _rms(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference where both are finite."""
    return float(_finite(a - b).square().mean().sqrt())


def _finite(a: Tensor) -> Tensor:
    return torch.where(torch.isfinite(a), a, 0)
