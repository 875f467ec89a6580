"""Forward gradients: exact slopes along random directions, of weights (FG-W) or of activities and local losses (LG-FG-A).

FG-W (Baydin et al. 2022): g = 1/q sum_i <grad l, v_i> v_i, v_i ~ N(0, I), the slope by one forward-mode pass. It is RGE at
mu -> 0: E g = grad l, and E |g - grad l|^2 = (d + 1)/q |grad l|^2.
LG-FG-A (Ren et al. 2022): the gradient stops between blocks, each of which has a loss of its own; noise u is on the normalised
pre-activations z of its layers, for each image; and that loss is split over patches p and groups of channels g, which see only
what the noise changes in their own part of the block's output x. With x. the change of x by the noise, P patches:
    t[n, p, g] = 1/P sum_(c in g) (W_h^T e_n)[c] x.[n, p, c],  e = dl/dlogits of the block's head W_h
    dl/dz ~ t u 1[h > 0];  of a layer that mixes patches  sum_g t u 1[h > 0]
Then exactly back through that layer alone. Its mean is the gradient of the local losses.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.autograd.forward_ad as forward
from torch import Tensor, nn

from dzhpc.errors import DzhpcError, InputError, message_of
from dzhpc.method.estimators import RGE, Estimator, directions

FINAL_RATE = 0.1  # of the last classifier, beside the others'


class ForwardGradient(RGE):
    """FG-W: the same directions as RGE's, without mu. ``zo.q`` directions; None: one."""

    def units(self, n: int) -> int:
        return self.zo.q or 1

    def perturbations(self, n: int) -> int:
        return self.units(n)

    def evaluate(self, engine, coords: np.ndarray, step: int, piece: range) -> Tensor:
        return engine.slopes(directions(engine.index, piece, self._seed(step), coords))

    def check(self, engine) -> None:
        """Raises InputError for a network or a loss that has no forward-mode derivative."""
        if not hasattr(engine, "slopes"):
            raise InputError(f'zo.estimator = "{self.zo.estimator}": needs a network that it can see into')
        try:
            engine.slopes(directions(engine.index, range(1), self.seed, np.arange(engine.index.size)))
        except DzhpcError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise InputError(
                f'zo.estimator = "{self.zo.estimator}": no forward-mode derivative ({message_of(error)}); use rge'
            ) from None


class LocalForwardGradient(Estimator):
    """LG-FG-A: its task makes the step, in parts of the batch that ranks share. ``zo.q`` passes are averaged; None: one."""

    asks = False

    def units(self, n: int) -> int:
        return 0

    def perturbations(self, n: int) -> int:
        return self.zo.q or 1

    def combine(self, engine, coords: np.ndarray, step: int, values: Tensor) -> Tensor:
        raise InputError(f'zo.estimator = "{self.zo.estimator}": needs task.kind = "classification"')


def local_forward_gradient(
    model: nn.Module,
    inputs: Tensor,
    loss: Callable[[Tensor], Tensor],
    q: int,
    noise: Callable[[Sequence[int]], Tensor] = torch.randn,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss of the model's outputs, parameter name -> estimate) of LG-FG-A on one batch. Heads have their exact gradients.

    model: as :class:`dzhpc.models.mixer.LocalMixer`. loss: of logits [B, K], a mean over the batch. q: passes, averaged.
    noise: shape -> N(0, 1), on the CPU.
    """
    found: dict[int, Tensor] = {}

    def add(value: Tensor, module: nn.Module, factor: float = 1.0) -> None:
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters or not value.requires_grad:
            return
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        found.update({id(p): factor * g for p, g in zip(parameters, gradients, strict=True) if g is not None})

    with torch.enable_grad():
        x = model.patches(inputs)
        for block, head in zip(model.blocks, model.heads, strict=True):
            pre, masks, h = [], [], x
            for stage in block.stages():
                pre.append(stage.normalised(h))
                h = stage.activation(pre[-1], x).detach()
                masks.append(h > 0)
            logits = head(h.mean(1))
            at = logits.detach().requires_grad_()  # a head may be frozen
            (error,) = torch.autograd.grad(loss(at), at)
            add((logits * error).sum(), head)
            seen = (error @ head.weight).detach()[:, None, :] / h.shape[1]
            estimates = _activity_gradients(block, x, masks, seen, q, noise)
            total = sum((z * estimate).sum() for z, estimate in zip(pre, estimates, strict=True))
            add(total, block)
            x = h
        value = loss(model.final(x.mean(1)))
        add(value, model.final, FINAL_RATE)
    named = model.named_parameters()
    return value.detach(), {name: found.get(id(p), torch.zeros_like(p)) for name, p in named if p.requires_grad}


@torch.no_grad()
def _activity_gradients(block, x: Tensor, masks: list[Tensor], seen: Tensor, q: int, noise: Callable) -> list[Tensor]:
    """Estimates of dl/dz [B, P, C] for each stage. seen: what each output counts in the head's error [B, 1, C]."""
    totals = [torch.zeros(m.shape, dtype=x.dtype, device=x.device) for m in masks]
    for _ in range(q):
        noises = [noise(m.shape).to(x) * m for m in masks]
        change = changed(block, x, noises)
        t = (change * seen).unflatten(-1, (block.groups, -1)).sum(-1, keepdim=True)  # [B, P, G, 1]
        for total, stage, u in zip(totals, block.stages(), noises, strict=True):
            if stage.mixes_patches:
                total += t.sum(2) * u / q
            else:
                total += (t * u.unflatten(-1, (block.groups, -1))).flatten(-2) / q
    return totals


@torch.no_grad()
def changed(block, x: Tensor, noises: Sequence[Tensor]) -> Tensor:
    """How noise on the pre-activations of a block's stages changes its output [B, P, C], to first order, exactly."""
    with forward.dual_level():
        h = x
        for stage, u in zip(block.stages(), noises, strict=True):
            h = stage.activation(stage.normalised(h) + forward.make_dual(torch.zeros_like(u), u), x)
        return forward.unpack_dual(h).tangent.clone()
