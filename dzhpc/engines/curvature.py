"""The loss as a function of the outputs z of a batch, around those at theta: what Gauss-Newton needs of it.

r = dl/dz and B = d2l/dz2, positive semi-definite, are known without a query. Of a change D of the outputs

    slope  <r, D>        root  R D [M], with R^T R = B

so that with J = dz/dtheta the gradient is J^T r, and the generalised Gauss-Newton matrix (R J)^T (R J) (Schraudolph 2002).
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dzhpc.engines.losses import LOSSES, Loss
from dzhpc.errors import InputError


class Curvature(ABC):
    """Of the batch that is bound. ``size``: M, the numbers of a root."""

    size: int

    @abstractmethod
    def slopes(self, changes: Tensor) -> Tensor:
        """<r, D> for changes [P, *z.shape] -> [P], summed in float64, in the changes' dtype."""

    @abstractmethod
    def roots(self, changes: Tensor) -> Tensor:
        """R D for changes [P, *z.shape] -> [P, M]."""


class CrossEntropy(Curvature):
    """Mean over N samples of -sum_k t_k log softmax(z)_k. With m = sum t: N r = m p - t, N B = m (diag p - p p^T) = N R^T R,
    R D ~ sqrt(m p) (D - p^T D).

    log_p: log softmax of the outputs [N, K] float64. targets: weights t >= 0 [N, K], or labels [N], whose m is 1.
    """

    def __init__(self, log_p: Tensor, targets: Tensor, dtype: torch.dtype):
        p = log_p.exp()
        t = torch.nn.functional.one_hot(targets, p.shape[1]) if targets.ndim == 1 else targets
        mass = t.sum(1, keepdim=True, dtype=p.dtype)
        self.size = p.numel()
        self._p, self._root = p.to(dtype), (mass * p / len(p)).sqrt().to(dtype)
        self._residual = ((mass * p - t) / len(p)).to(dtype)

    def slopes(self, changes: Tensor) -> Tensor:
        return _summed(changes * self._residual)

    def roots(self, changes: Tensor) -> Tensor:
        mean = (changes * self._p).sum(-1, keepdim=True)
        return ((changes - mean) * self._root).flatten(1)


class Squares(Curvature):
    """sum_i w_i r_i^2 / 2 over residuals: slope sum w r D, root sqrt(w) D.

    residual [...]; weight: w, broadcasts against it.
    """

    def __init__(self, residual: Tensor, weight: Tensor | float):
        weight = torch.as_tensor(weight, dtype=torch.float64, device=residual.device)
        self.size = residual.numel()
        self._weighed, self._root = (residual * weight).to(residual.dtype), weight.sqrt().to(residual.dtype)

    def slopes(self, changes: Tensor) -> Tensor:
        return _summed(changes * self._weighed)

    def roots(self, changes: Tensor) -> Tensor:
        return (changes * self._root).flatten(1)


def curvature_of(loss: Loss, outputs: Tensor, targets: Tensor, dtype: torch.dtype) -> Curvature:
    """That of a loss of outputs [N, ...]. A loss of the user's own may have a method ``curvature(outputs, targets, dtype)``.

    Raises InputError for a loss whose curvature is not known.
    """
    own = getattr(loss, "curvature", None)
    if own is not None:
        return own(outputs, targets, dtype)
    if loss is LOSSES["mse"] and outputs.shape == targets.shape:
        return Squares((outputs.double() - targets.double()).to(dtype), 2 / outputs.numel())
    if loss is LOSSES["cross_entropy"] and outputs.ndim == 2:
        labels = targets.ndim == 1 and not targets.is_floating_point() and bool((targets >= 0).all())
        if labels or targets.shape == outputs.shape:
            return CrossEntropy(outputs.double().log_softmax(1), targets, dtype)
    name = next((name for name, known in LOSSES.items() if known is loss), getattr(loss, "__name__", type(loss).__name__))
    shapes = [list(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (outputs, targets)]
    raise InputError(
        f'the loss "{name}" has no curvature that is known for outputs {shapes[0]} and targets {shapes[1]}, '
        'which optim.name = "gauss-newton" needs: cross entropy of [N, K] logits, a squared error, or residuals'
    )


def _summed(products: Tensor) -> Tensor:
    """Over all axes but the first."""
    return products.flatten(1).sum(1, dtype=torch.float64).to(products.dtype)
