"""torch.optim and its schedulers, chosen by the input."""

import inspect
import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from dzhpc.config import Optim


def _bare(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """An optimizer without its wrappers, which import torch's compiler (1.5 s a rank) only to tell it to keep off."""
    methods = {"add_param_group": inspect.unwrap(kind.add_param_group), "step": torch.no_grad()(inspect.unwrap(kind.step))}
    return type(kind.__name__, (kind,), methods)


SGD, Adam, OfMatrices = _bare(torch.optim.SGD), _bare(torch.optim.Adam), _bare(torch.optim.Muon)


class Muon(SGD):
    """torch.optim.Muon for matrices and kernels, these as [out, rest]; SGD at the rate ``lr_vectors`` for biases, gains, scalars.

    Momentum and Nesterov's are those of both. Only matrices decay, decoupled from the step: theta (1 - lr decay) - lr step. That
    takes a hundred times SGD's decay, which would pull gains to zero.
    """

    def __init__(self, section: Optim, parameters: dict[str, torch.Tensor]):
        matrices = [p for p in parameters.values() if p.ndim > 1]
        vectors = [p for p in parameters.values() if p.ndim <= 1]
        keys = {"momentum": section.momentum, "weight_decay": section.weight_decay, "nesterov": section.nesterov}
        groups = [{"params": matrices, "lr": section.lr}, {"params": vectors, "lr": section.lr_vectors, "weight_decay": 0.0}]
        super().__init__(groups, **keys)
        self._flat = [torch.empty_like(p.flatten(1)) for p in matrices]
        self._muon = OfMatrices(self._flat, lr=section.lr, **keys) if matrices else None

    @torch.no_grad()
    def step(self) -> None:
        """theta moves by the gradients that parameters hold."""
        matrices = self.param_groups[0]["params"]
        gradients = [p.grad for p in matrices]
        for p in matrices:
            p.grad = None  # so that SGD leaves it
        super().step()
        if self._muon is None:
            return
        self._muon.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        for p, gradient, flat in zip(matrices, gradients, self._flat, strict=True):
            flat.copy_(p.flatten(1))
            flat.grad = gradient.flatten(1)
            if p in self.state:
                self._muon.state[flat]["momentum_buffer"] = self.state[p]["momentum_buffer"].flatten(1).clone()
        self._muon.step()
        for p, gradient, flat in zip(matrices, gradients, self._flat, strict=True):
            p.grad = gradient
            p.copy_(flat.view(p.shape))
            buffer = self.state[p].setdefault("momentum_buffer", torch.empty_like(p))
            buffer.copy_(self._muon.state[flat]["momentum_buffer"].view(p.shape))


class GaussNewton(SGD):
    """SGD on Gauss-Newton steps: a parameter's ``grad`` is -delta there, its momentum that of the step.

    Weight decay is decoupled: theta (1 - lr decay) - lr (momentum + step). curvature: what is averaged over steps, and lambda.
    """

    def __init__(self, section: Optim, parameters: dict[str, torch.Tensor]):
        super().__init__(parameters.values(), lr=section.lr, momentum=section.momentum, nesterov=section.nesterov)
        self._decay, self._rests = section.weight_decay, False
        self.curvature: dict[str, torch.Tensor] = {"damping": torch.tensor(section.damping, dtype=torch.float64)}

    @torch.no_grad()
    def step(self) -> None:
        """theta becomes the one that :meth:`move` leads to; it stays as it is where the optimiser was told to :meth:`rest`."""
        if self._rests:
            self._rests = False
            return
        (group,) = self.param_groups
        for p in group["params"]:
            p.mul_(1 - group["lr"] * self._decay)
        super().step()

    @torch.no_grad()
    def move(self, steps: list[torch.Tensor]) -> list[torch.Tensor]:
        """What :meth:`step` would add to each parameter, were its ``grad`` minus its one of ``steps``."""
        (group,) = self.param_groups
        lr, momentum, found = group["lr"], group["momentum"], []
        for p, step in zip(group["params"], steps, strict=True):
            before = self.state[p].get("momentum_buffer") if p in self.state else None
            buffer = step if before is None else step - momentum * before
            found.append(lr * ((step + momentum * buffer if group["nesterov"] else buffer) - self._decay * p))
        return found

    def rest(self) -> None:
        """Forget the momentum, which leads nowhere; the next step is none, weight decay included."""
        self.state.clear()
        self._rests = True


def make_optimizer(section: Optim, parameters: dict[str, torch.Tensor]) -> torch.optim.Optimizer:
    """SGD, Adam, Muon, or SGD on Gauss-Newton steps over named parameters; a group's ``initial_lr`` is its peak rate."""
    optimizer = _made(section, parameters)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _made(section: Optim, parameters: dict[str, torch.Tensor]) -> torch.optim.Optimizer:
    if section.name == "muon":
        return Muon(section, parameters)
    if section.name == "gauss-newton":
        return GaussNewton(section, parameters)
    if section.name == "adam":
        return Adam(parameters.values(), lr=section.lr, weight_decay=section.weight_decay)
    values, decay = parameters.values(), section.weight_decay
    return SGD(values, lr=section.lr, momentum=section.momentum, weight_decay=decay, nesterov=section.nesterov)


def make_schedule(optimizer: torch.optim.Optimizer, section: Optim, epochs: float, steps_per_epoch: int, step: int) -> LambdaLR:
    """The learning rate as a function of the step alone, so that a restart at any ``step`` continues it exactly.

    Warm-up is linear over ``warmup_epochs``; then cosine to 0 at ``epochs``, or steps at ``milestones``, or constant.
    """

    def factor(k: int) -> float:
        epoch = k / steps_per_epoch
        if epoch < section.warmup_epochs:
            return (k + 1) / math.ceil(section.warmup_epochs * steps_per_epoch)
        if section.schedule == "cosine":
            done = min(1.0, (epoch - section.warmup_epochs) / max(epochs - section.warmup_epochs, 1e-12))
            return 0.5 * (1 + math.cos(math.pi * done))
        if section.schedule == "step":
            return section.gamma ** sum(epoch >= m for m in section.milestones)
        return 1.0

    return LambdaLR(optimizer, factor, last_epoch=step - 1)


def slots(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The optimizer's state as slot -> parameter name -> tensor (momentum_buffer; exp_avg, exp_avg_sq, step).

    That of Gauss-Newton has a slot "curvature" of another kind: name -> tensor, complete on the root alone.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    if isinstance(optimizer, GaussNewton):
        found["curvature"] = optimizer.curvature
    for name, p in parameters.items():
        for slot, value in optimizer.state.get(p, {}).items():
            if value is not None:
                found.setdefault(slot, {})[name] = value
    return found


def restore(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.Tensor], state: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Put back what :func:`slots` gave; each slot in its parameter's memory layout."""
    for slot, tensors in state.items():
        if slot == "curvature":
            optimizer.curvature = dict(tensors)
            continue
        for name, value in tensors.items():
            p = parameters[name]
            optimizer.state[p][slot] = value.clone() if slot == "step" else torch.empty_like(p).copy_(value)
