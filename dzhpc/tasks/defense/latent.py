"""The loss of ZO-AE-DS (Zhang et al., ICLR 2022): known by queries alone, with a gradient that the chain rule goes on from."""

from collections.abc import Callable

import torch
from torch import Tensor

AT_ONCE = 8  # coordinates of the code in one call


class QueriedLoss:
    """The mean of ``losses(decode(z))``, known by queries alone, as a value that autograd can continue from.

    losses: (images [N, ...], targets [N, ...]) -> [N], not differentiated. Each sample has its own difference, so that one query
    for each coordinate of the code and sample is enough: dL_i/dz_ik = [l_i(z_i + mu e_k) - l_i(z_i)] / mu.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], losses: Callable[[Tensor, Tensor], Tensor], mu: float):
        self._decode, self._losses, self._mu = decode, losses, mu

    def __call__(self, code: Tensor, targets: Tensor) -> Tensor:
        """code [B, ...], targets [B, ...] -> scalar float64, with the gradient by CGE behind it."""
        base, slopes = self._slopes(code.detach(), targets)
        return _Known.apply(code, base.mean(), slopes / len(code))

    @torch.no_grad()
    def _slopes(self, code: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        base, flat = self._losses(self._decode(code), targets), code.flatten(1)
        columns = []
        for part in torch.eye(flat.shape[1], dtype=code.dtype, device=code.device).split(AT_ONCE):
            moved = (flat + self._mu * part[:, None]).reshape(-1, *code.shape[1:])
            losses = self._losses(self._decode(moved), targets.repeat(len(part), *[1] * (targets.ndim - 1)))
            columns.append((losses.view(len(part), -1) - base) / self._mu)
        return base, torch.cat(columns).T.reshape(code.shape)


class _Known(torch.autograd.Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(context, code: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        context.save_for_backward(gradient.to(code.dtype))
        return value.clone()

    @staticmethod
    def backward(context, outer: Tensor):
        (gradient,) = context.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None
