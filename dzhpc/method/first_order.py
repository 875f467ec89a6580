"""A first-order step in parts that ranks may share: gradients by autograd, summed in one order whatever the rank count."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dzhpc.method.coordinates import ParameterIndex
from dzhpc.method.seeds import derive

PARTS = 8  # of a batch; fixed, since the cut decides the bits (and what a BatchNorm sees)


class SharedGradient:
    """Rows [1 + d + b] float64 of parts of a batch: loss, gradient, buffers, each for the mean over the whole batch.

    batch: step -> (its size, loss), where loss: positions of the batch -> the mean loss over them, with its graph.
    """

    parts = PARTS

    def __init__(self, model: torch.nn.Module, seed: int, batch: Callable[[int], tuple[int, Callable[[slice], Tensor]]]):
        self._model, self._seed, self._batch = model, seed, batch
        self._index = ParameterIndex.of(model)
        self.width = 1 + self._index.size + sum(b.numel() for b in model.buffers())  # of a row

    def rows(self, mine: range, step: int) -> np.ndarray:
        """[len(mine), 1 + d + b] of the parts ``mine``, numbers below ``parts``, of a step; buffers are left as they were."""
        size, loss = self._batch(step)
        before = [b.clone() for b in self._model.buffers()]
        rows = []
        for part in mine:
            positions = slice(size * part // PARTS, size * (part + 1) // PARTS)
            share = (positions.stop - positions.start) / size
            torch.manual_seed(derive(self._seed, "part", step, part))
            if share == 0:
                rows.append(torch.zeros(1 + self._index.size, dtype=torch.float64))
            else:
                value = loss(positions)
                gradient = torch.autograd.grad(value, self._index.parameters, allow_unused=True)
                pairs = zip(gradient, self._index.parameters, strict=True)
                flat = self._index.flatten(torch.zeros_like(p) if g is None else g for g, p in pairs)
                rows.append(share * torch.cat([value.detach().double().reshape(1).to(flat.device), flat.double()]).cpu())
            rows[-1] = torch.cat([rows[-1], *(b.detach().double().reshape(-1).cpu() for b in self._model.buffers())])
            self._restore(before)
        return torch.stack(rows).numpy() if rows else np.zeros((0, self.width))

    @torch.no_grad()
    def join(self, rows: np.ndarray) -> tuple[float, Tensor]:
        """(loss, gradient [d] in the parameters' dtype) of all parts; the buffers become the mean of theirs."""
        index, total = self._index, torch.from_numpy(np.add.reduce(rows, axis=0))
        place = 1 + index.size
        for b in self._model.buffers():
            b.copy_((total[place : place + b.numel()] / len(rows)).view(b.shape))
            place += b.numel()
        return float(total[0]), total[1 : 1 + index.size].to(index.device, index.dtype)

    @torch.no_grad()
    def _restore(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self._model.buffers(), values, strict=True):
            buffer.copy_(value)
