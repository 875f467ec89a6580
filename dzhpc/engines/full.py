"""Engine ``full``: the whole model for every query. The reference that the others are compared with."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from dzhpc.engines.batch import BatchEngine
from dzhpc.engines.losses import Loss, loss_of
from dzhpc.engines.network import untouched
from dzhpc.engines.protocol import AT_ONCE, PLAIN
from dzhpc.errors import InputError
from dzhpc.method.coordinates import ParameterIndex, cut

CHUNK = 4  # coordinates between two looks at the clock; they are evaluated one at a time all the same


class Full(BatchEngine):
    """Evaluates l(theta + mu e_j) - l(theta) by running the model once per coordinate.

    Every query sees the buffers and the random numbers that the base pass saw. Raises InputError for a name of no loss, for a
    callable without ``parameters`` that is no torch.nn.Module, and where there is no trainable parameter.
    """

    at_once, base_bytes, peak_bytes, compile_s, environment = AT_ONCE, 0, 0, 0.0, PLAIN

    def __init__(self, model: Callable, loss: str | Loss, parameters: Mapping[str, Tensor] | None = None):
        loss = loss_of(loss)
        if parameters is None and not isinstance(model, torch.nn.Module):
            raise InputError("a callable that is not a torch.nn.Module needs parameters = {name: tensor}")
        super().__init__(ParameterIndex(parameters) if parameters is not None else ParameterIndex.of(model), model, loss)

    @torch.no_grad()
    def bind(self, inputs: Tensor, targets: Tensor) -> float:
        """The batch loss at theta. Later differences are on this batch. The only pass that moves buffers.

        Raises InputError for a model that overwrites its input.
        """
        self._begin()
        self.batch = inputs, targets
        with untouched(inputs, self.model):
            base = self._base_loss(self.model(inputs), targets)
        return self._bound(base)

    def cut(self, coords: np.ndarray) -> list[range]:
        """Chunks of a coordinate list [n], as ranges of positions; of one parameter each, whether a batch is bound or not."""
        return cut(self.index.owner(coords), CHUNK)

    @torch.no_grad()
    def differences(self, coords: Iterable[int], mu: float) -> Tensor:
        """l(theta + mu e_j) - l(theta) for each j in ``coords`` (integers [n], any order) -> [n] in the parameters' dtype.

        Raises InputError for a coordinate outside 0 <= j < d.
        """
        return self._one_by_one(coords, mu)

    @torch.no_grad()
    def responses(self, coords: Iterable[int], mu: float) -> Tensor:
        """z(theta + mu e_j) - z(theta) for each j in ``coords`` -> [n, *z.shape], by subtraction."""
        return self._responses_singly(coords, mu)

    def explain(self) -> str:
        """See :class:`dzhpc.engines.protocol.Engine`."""
        return "engine full: the whole model for every query, one coordinate at a time"

    def _outputs_now(self, owner: int | None) -> Tensor:
        return self.model(self.batch[0])
