"""An optimiser with the closure of torch.optim, for those who own a training loop: ``dzhpc.optim.ZO(model.parameters())``."""

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dzhpc.errors import InputError
from dzhpc.training.loop import Loop

__all__ = ["ZO"]
KEPT = ("config", "step", "epoch", "queries", "seed", "model_sha256", "optimizer", "coordinates", "estimator")


class ZO(torch.optim.Optimizer):
    """``step(closure)`` makes a zeroth-order step; ``closure()`` gives the loss, without ``backward``, as often as it is called.

    params: parameters, all in one group. lr may be changed in ``param_groups[0]``, by a scheduler of torch's, say. Others are
    those of :class:`dzhpc.Loop`, which is the attribute ``loop``. ``state_dict()`` and ``load_state_dict()`` are as torch's: they
    have momentum, and the random numbers to come, but not the parameters, which the model's ``state_dict`` has.
    Within a step the closure must be one function of the parameters: one batch, one dropout mask, no running statistics. Where it
    raises, the parameters are as before, and the next ``step`` begins anew, with another batch perhaps.
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
                loss = _number(_asked(closure))
            except BaseException:
                loop.forget()
                raise
            finally:
                _assign(index, theta)
            loop.tell([loss])
        return loop.loss

    def add_param_group(self, param_group: dict) -> None:
        """The one of the constructor. Raises InputError for another, which would never be trained."""
        if hasattr(self, "loop"):
            raise InputError("dzhpc.optim.ZO has one group of parameters; make a new optimiser for others")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, object]:
        """A copy would share the loop. Raises InputError."""
        raise InputError("dzhpc.optim.ZO: cannot be copied or pickled; make a new one, and give it this one's state_dict()")

    def state_dict(self) -> dict[str, object]:
        """``param_groups`` as torch has it, and in ``loop`` what :data:`KEPT` names; ``torch.load`` reads it as weights only."""
        state = self.loop.state()
        kept = {name: getattr(state, name) for name in KEPT} | {"coordinates": torch.from_numpy(state.coordinates)}
        return super().state_dict() | {"loop": kept}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Go on from there, with the parameters as they are now. Raises InputError, CheckpointError for what does not fit."""
        kept = state_dict.get("loop")
        if not isinstance(kept, dict) or set(kept) != set(KEPT):
            raise InputError("load_state_dict(): expected what state_dict() of a dzhpc.optim.ZO gave")
        state, old = self.loop.state(), {**kept, "coordinates": kept["coordinates"].numpy()}
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.loop.restore(dataclasses.replace(state, **old), "load_state_dict()")


def _asked(closure: Callable[[], Tensor | float]) -> Tensor | float:
    try:
        return closure()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise InputError("the closure calls backward(), and needs none: expected it to give the loss alone") from error


def _number(loss: object) -> float:
    try:
        return float(loss)
    except (TypeError, ValueError, RuntimeError):
        found = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"the closure gave {found}; expected the loss, one number") from None


def _assign(index, theta: Tensor) -> None:
    for p, value in zip(index.parameters, index.split(theta).values(), strict=True):
        p.copy_(value)
