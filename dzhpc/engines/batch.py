"""What engines share whose loss is a function of the outputs of a batch: those outputs, and how perturbations change them."""

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from dzhpc.engines.blackbox import BlackBoxLoss
from dzhpc.engines.curvature import Curvature, curvature_of
from dzhpc.engines.losses import Loss
from dzhpc.engines.network import NetworkEngine
from dzhpc.method.coordinates import ParameterIndex


class BatchEngine(NetworkEngine):
    """Over a model, a loss (outputs, targets) -> scalar, and a batch (inputs, targets).

    z: what the loss is a function of, the network's outputs [B, ...], or where the loss ends in a black box its answers.
    """

    def __init__(self, index: ParameterIndex, model: object, loss: Loss):
        super().__init__(index, model)
        self.model, self.loss = model, loss
        self.batch: tuple[Tensor, Tensor] | None = None
        self._z: Tensor | None = None  # at theta
        self._curvature: Curvature | None = None

    @property
    def curvature(self) -> Curvature:
        """See :class:`dzhpc.engines.protocol.Responding`."""
        self._need_base()
        if self._curvature is None:
            self._curvature = curvature_of(self.loss, self._z, self.batch[1], self.index.dtype)
        return self._curvature

    @abstractmethod
    def responses(self, coords: Iterable[int], mu: float) -> Tensor:
        """z(theta + mu e_j) - z(theta) for each j in ``coords`` -> [n, *z.shape] in the parameters' dtype."""

    def _responses_singly(self, coords: Iterable[int], mu: float) -> Tensor:
        """The same, each coordinate really moved."""
        values = self._moving_each(coords, mu, self._response)
        shape = (0, *self._z.shape)
        return torch.stack(values) if values else torch.zeros(shape, dtype=self.index.dtype, device=self.index.device)

    @abstractmethod
    def _outputs_now(self, owner: int | None) -> Tensor:
        """The outputs [B, ...] at the parameters as they are now."""

    def _base_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of the base outputs, of which z is kept."""
        base = self.loss(outputs, targets)
        self._z, self._curvature = self._seen(outputs), None
        return base

    def _loss(self, owner: int | None) -> Tensor:
        return self.loss(self._outputs_now(owner), self.batch[1])

    def _loss_with_graph(self) -> Tensor:
        return self.loss(self.model(self.batch[0]), self.batch[1])

    def _response(self, owner: int) -> Tensor:
        self.queries += 1
        self._pinned.rewind(self._start)
        outputs = self._outputs_now(owner)
        if isinstance(self.loss, BlackBoxLoss):
            self.loss(outputs, self.batch[1])
        return changed(self._seen(outputs), self._z).to(self.index.dtype)

    def _seen(self, outputs: Tensor) -> Tensor:
        """z, once the loss of these outputs is known."""
        return self.loss.answered[0] if isinstance(self.loss, BlackBoxLoss) else outputs


def changed(now: Tensor, before: Tensor) -> Tensor:
    """now - before, 0 where they are equal: logits may be -inf."""
    return torch.where(now == before, 0, now - before)
