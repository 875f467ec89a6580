"""A first-order step in parts that ranks may share: gradients by autograd, summed in one order whatever the rank count."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from dzhpc.errors import InputError, is_out_of_memory, message_of
from dzhpc.method.coordinates import ParameterIndex
from dzhpc.method.seeds import derive

Found = Tensor | tuple[Tensor, Mapping[str, Tensor]]
PARTS = 8  # of a batch; fixed, since the cut decides the bits (and what a BatchNorm sees)


@contextmanager
def differentiating(model: object) -> Iterator[None]:
    """A network that autograd cannot differentiate is no fault, since queries do without. Raises InputError in its place."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:  # as torch says it, and backward passes of the user's
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"autograd finds no gradient of {type(model).__name__} ({message_of(error)}); use zo.estimator cge or rge, and "
            "sparsity.scores zo-grasp or random"
        ) from error


class SharedGradient:
    """Rows [1 + d + b] float64 of parts of a batch: loss, gradient, buffers, each for the mean over the whole batch.

    batch: step -> (its size, loss), where loss: positions of the batch -> the mean loss over them, with its graph; or that
        loss and a gradient by other means, parameter name -> tensor.
    """

    parts = PARTS

    def __init__(self, model: torch.nn.Module, seed: int, batch: Callable[[int], tuple[int, Callable[[slice], Found]]]):
        self._model, self._seed, self._batch = model, seed, batch
        self._index = ParameterIndex.of(model)
        self.width = 1 + self._index.size + sum(b.numel() for b in model.buffers())  # of a row

    def rows(self, mine: range, step: int) -> np.ndarray:
        """[len(mine), 1 + d + b] of the parts ``mine``, numbers below ``parts``, of a step; buffers are left as they were."""
        size, loss = self._batch(step)
        before, full = [b.clone() for b in self._model.buffers()], min(size, PARTS)  # parts that are not empty
        rows = []
        for part in mine:
            positions = slice(size * part // PARTS, size * (part + 1) // PARTS)
            share = (positions.stop - positions.start) / size
            torch.manual_seed(derive(self._seed, "part", step, part))
            if share == 0:
                rows.append(torch.zeros(1 + self._index.size, dtype=torch.float64))
            else:
                with differentiating(self._model):
                    value, gradient = self._differentiated(loss(positions))
                flat = self._index.flatten(gradient)
                rows.append(share * torch.cat([value.detach().double().reshape(1).to(flat.device), flat.double()]).cpu())
            moved = [b.detach().double().reshape(-1).cpu() * ((share > 0) / full) for b in self._model.buffers()]
            rows[-1] = torch.cat([rows[-1], *moved])
            self._restore(before)
        return torch.stack(rows).numpy() if rows else np.zeros((0, self.width))

    def _differentiated(self, found: Found) -> tuple[Tensor, list[Tensor]]:
        if isinstance(found, tuple):
            return found[0], [found[1][name] for name in self._index.names]
        gradient = torch.autograd.grad(found, self._index.parameters, allow_unused=True)
        return found, [torch.zeros_like(p) if g is None else g for g, p in zip(gradient, self._index.parameters, strict=True)]

    @torch.no_grad()
    def join(self, rows: np.ndarray) -> tuple[float, Tensor]:
        """(loss, gradient [d] in the parameters' dtype) of all parts; the buffers become the mean of those that are not empty."""
        index, total = self._index, torch.from_numpy(np.add.reduce(rows, axis=0))
        place = 1 + index.size
        for b in self._model.buffers():
            value = total[place : place + b.numel()].view(b.shape)
            b.copy_(value if b.is_floating_point() else value.round())
            place += b.numel()
        return float(total[0]), total[1 : 1 + index.size].to(index.device, index.dtype)

    @torch.no_grad()
    def _restore(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self._model.buffers(), values, strict=True):
            buffer.copy_(value)
