"""What changes of the outputs do to the loss."""

import torch
from torch import Tensor

from dzhpc.engines.delta.change import Change
from dzhpc.engines.delta.differences import cross_entropy_difference, mse_difference
from dzhpc.engines.kernels.find import Kernels
from dzhpc.engines.kernels.library import BATCH
from dzhpc.engines.losses import LOSSES, Loss, ManyLoss


class LossChange:
    """l(outputs + change) - l(outputs): by the difference's own formula for a loss that has one, else by subtraction."""

    def __init__(self, loss: Loss, dtype: torch.dtype, kernels: Kernels):
        self._loss, self._dtype, self._kernels = loss, dtype, kernels
        self._name = next((name for name, f in LOSSES.items() if f is loss), None)
        self._outputs: Tensor | None = None
        self._targets: Tensor | None = None
        self._prepared: Tensor | None = None  # what the formula needs of the base outputs; None: losses are subtracted
        self._by_class: tuple[Tensor, Tensor] | None = None  # log p and p [K, B], for our own library

    @property
    def asks(self) -> bool:
        """Whether losses are evaluated and subtracted."""
        return self._prepared is None

    def bind(self, outputs: Tensor, targets: Tensor) -> None:
        """The base outputs [B, ...] of a batch, and its targets."""
        self._outputs, self._targets, self._prepared = outputs, targets, self._prepare(outputs, targets)
        self._by_class = None
        served = self._name == "cross_entropy" and self._prepared is not None and len(targets) >= BATCH
        if served and self._kernels.library is not None:
            log_p = self._prepared.t().contiguous()
            self._by_class = log_p, log_p.exp()

    def __call__(self, of_outputs: Change, base: Tensor) -> Tensor:
        """[P] from the change of the outputs [B, ...]; ``base`` is the loss at theta."""
        if self._by_class and (library := self._kernels.library):
            rows = of_outputs.rows(self._outputs).to(self._dtype)
            return library.cross_entropies(rows, *self._by_class, self._targets)
        change = of_outputs.dense(self._outputs).to(self._dtype)
        if self._prepared is None:
            return self._subtracted(change, base)
        if self._name == "mse":
            return self._kernels.call(mse_difference, self._prepared, change, common=[0])
        return self._kernels.call(cross_entropy_difference, self._prepared, change, self._targets, common=[0, 2])

    def _prepare(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        if self._name == "cross_entropy":
            labels = targets.ndim == 1 and not targets.is_floating_point() and outputs.ndim == 2
            if labels and int(targets.min()) >= 0:  # no ignored samples
                return outputs.double().log_softmax(1).to(self._dtype)
        if self._name == "mse" and outputs.shape == targets.shape:
            return (outputs.double() - targets.double()).to(self._dtype)
        return None

    def _subtracted(self, change: Tensor, base: Tensor) -> Tensor:
        """Absolute values, for a loss that is a black box: all coordinates in one call where it takes many."""
        if isinstance(self._loss, ManyLoss):
            return (self._loss.many(self._outputs + change, self._targets) - base).to(self._dtype)
        losses = [self._loss(self._outputs + d, self._targets) - base for d in change]
        return torch.stack(losses).reshape(len(losses)).to(self._dtype)
