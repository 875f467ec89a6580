"""Engines: how the differences l(theta + mu e_j) - l(theta) are evaluated.

``full`` runs the whole model for every query; ``reuse`` only what lies downstream of the perturbed parameter; ``delta``
propagates the change itself, for many coordinates at once.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from dzhpc.engines.delta.engine import Delta
from dzhpc.engines.full import Full
from dzhpc.engines.reuse import Reuse
from dzhpc.errors import InputError


def make_engine(
    kind: str,
    model: Callable[[Tensor], Tensor],
    loss: str | Callable[[Tensor, Tensor], Tensor],
    precision: str = "fp32",
    memory_mb: float | None = None,
    parameters: Mapping[str, Tensor] | None = None,
) -> Full:
    """An engine over ``model``.

    kind: "full" (any module or callable), "reuse" or "delta" (any torch.nn.Module that torch.fx can trace).
    loss: "cross_entropy", "mse", or a callable (outputs, targets) -> scalar over the batch.
    precision: "fp32": differences travel in the parameters' own dtype; "bf16" ("delta" only): in bfloat16.
    memory_mb: "reuse" refuses a batch whose cached features need more MiB than this (None: no limit); "delta" cuts its chunks
        so that their changes need no more (None: a fixed default for each device type).
    parameters: name -> tensor, for a callable that is not a module; these tensors are perturbed in place.

    Raises InputError for an unknown kind, a model the engine cannot run, or a model without trainable parameters.
    """
    if precision not in ("fp32", "bf16"):
        raise InputError(f'precision = "{precision}": expected "fp32" or "bf16"')
    if precision == "bf16" and kind != "delta":
        raise InputError(f'precision = "bf16": engine "{kind}" subtracts losses, no digit would be left; use "delta", or "fp32"')
    if kind == "full":
        return Full(model, loss, parameters)
    if parameters is not None:
        raise InputError(f'engine "{kind}" perturbs a module\'s own parameters; use engine = "full" for parameters = {{...}}')
    if kind == "reuse":
        return Reuse(model, loss, memory_mb)
    if kind == "delta":
        return Delta(model, loss, precision, memory_mb)
    raise InputError(f'engine = "{kind}": expected "full", "reuse" or "delta"')
