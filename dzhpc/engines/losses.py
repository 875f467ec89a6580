"""Losses by name, and what a loss of one's own may offer."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor

from dzhpc.errors import InputError

Loss = Callable[[Tensor, Tensor], Tensor]  # (outputs [B, ...], targets) -> scalar


@runtime_checkable
class ManyLoss(Protocol):
    """A loss that takes several outputs at once, such as :class:`dzhpc.engines.blackbox.BlackBoxLoss`: fewer, larger calls."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of outputs [B, ...] against targets [B, ...] -> scalar."""

    def many(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The losses of outputs [P, B, ...], each of the P against the same targets [B, ...] -> [P] float64."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits [B, K] against labels [B], summed in float64: the loss changes by 1e-5 of itself."""
    return F.cross_entropy(_tensor(outputs).double(), targets)


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error over all elements, summed in float64."""
    return F.mse_loss(_tensor(outputs).double(), targets.double())


def _tensor(outputs: object) -> Tensor:
    """Raises InputError for a network that gives anything else."""
    if not isinstance(outputs, Tensor):
        raise InputError(f"the network gives {type(outputs).__name__}; a loss that has a name takes one tensor")
    return outputs


LOSSES = {"cross_entropy": cross_entropy, "mse": mse}


def loss_of(loss: str | Loss) -> Loss:
    """The loss of a name, or the given one. Raises InputError for a name that there is not."""
    if isinstance(loss, str) and loss not in LOSSES:
        raise InputError(f'loss = "{loss}": expected "cross_entropy", "mse" or a callable (outputs, targets) -> scalar')
    return LOSSES[loss] if isinstance(loss, str) else loss
