"""An optimiser with the closure of torch.optim, for those who own a training loop: ``dzhpc.optim.ZO(model.parameters())``."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dzhpc.errors import InputError
from dzhpc.training.loop import Loop

__all__ = ["ZO"]


class ZO(torch.optim.Optimizer):
    """``step(closure)`` makes a zeroth-order step; ``closure()`` gives the loss, without ``backward``, as often as it is called.

    params: parameters, all in one group. lr may be changed in ``param_groups[0]``, by a scheduler of torch's, say. Others are
    those of :class:`dzhpc.Loop`, which is the attribute ``loop``: it saves and loads the state.
    Within a step the closure must be one function of the parameters: one batch, one dropout mask, no running statistics.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-2, **options: object):
        params = [p[1] if isinstance(p, tuple) else p for p in params]  # of named_parameters()
        if any(isinstance(p, dict) for p in params):
            raise InputError("dzhpc.optim.ZO: expected parameters, not groups of them")
        super().__init__(params, {"lr": lr})
        self.loop = Loop(nn.ParameterList(params), lr=lr, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float]) -> float:
        """One step; the loss at the parameters with which it began."""
        loop, index = self.loop, self.loop.index
        theta, number = index.flatten(p.detach().clone() for p in index.parameters), loop.step
        loop.learning_rate = self.param_groups[0]["lr"]
        while loop.step == number:
            asked = loop.ask(limit=1)[0]
            try:
                _assign(index, asked)
                loss = float(closure())
            finally:
                _assign(index, theta)
            loop.tell([loss])
        return loop.loss


def _assign(index, theta: Tensor) -> None:
    for p, value in zip(index.parameters, index.split(theta).values(), strict=True):
        p.copy_(value)
