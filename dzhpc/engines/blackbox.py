"""A function that can only be asked: batched, counted, its answers checked; and a loss that ends in one."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dzhpc.errors import InputError, NumericalError


class BlackBox:
    """Answers [N, ...] of ``function`` to inputs [N, ...], in calls of at most ``batch_limit``; no gradient is ever taken.

    function: gets and gives torch tensors, or numpy arrays where ``numpy`` is true. ``queries`` counts inputs.
    Raises InputError for answers of a wrong shape, NumericalError for answers that are not numbers.
    """

    def __init__(self, function: Callable, batch_limit: int = 1024, numpy: bool = False):
        if batch_limit < 1:
            raise InputError(f"batch_limit = {batch_limit}: expected at least 1")
        self._function, self._limit, self._numpy = function, batch_limit, numpy
        self._name = getattr(function, "__name__", type(function).__name__)
        self.queries = 0

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """In as few calls as the limit allows."""
        return torch.cat([self._ask(part) for part in inputs.detach().split(self._limit)])

    def _ask(self, inputs: Tensor) -> Tensor:
        self.queries += len(inputs)
        answers = self._function(inputs.cpu().numpy() if self._numpy else inputs)
        answers = torch.as_tensor(answers if isinstance(answers, Tensor) else np.asarray(answers)).detach().to(inputs.device)
        if answers.ndim == 0 or len(answers) != len(inputs):
            raise InputError(f"{self._name} gave {list(answers.shape)} for {len(inputs)} inputs; expected an answer to each")
        if not torch.isfinite(answers).all():
            raise NumericalError(f"{self._name} gave answers that are not finite")
        return answers


class BlackBoxLoss:
    """mean over the batch of criterion(box(outputs), targets), for many perturbed outputs at once.

    criterion: (answers [N, ...], targets [N, ...]) -> losses [N].
    """

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
        return losses.double().view(p, -1).mean(1)
