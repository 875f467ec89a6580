"""Engines: how the differences l(theta + mu e_j) - l(theta) are evaluated.

``full`` runs the whole model for every query; ``reuse`` only what lies downstream of the perturbed parameter; ``delta``
propagates the change itself, for many coordinates at once. What all of them offer is :mod:`dzhpc.engines.protocol`.

| word | meaning |
|---|---|
| theta, d | the trainable parameters as one vector of d coordinates |
| base | the pass at theta, and what it gives: base loss, base outputs, base values of operations |
| bind | run the base pass on a batch, which differences are then about |
| query | one evaluation of the loss, at one perturbed theta or at theta itself |
| owner | the number of the parameter that a coordinate belongs to |
| chunk | P coordinates of one owner, evaluated together |
| tail | the operations downstream of a parameter, up to the output |
| change | D: what an operation gives at the perturbed theta, less its base value; [P, ...] for a chunk |
| seed, origin | the change that a perturbed parameter's own operation makes: where the changes of a chunk begin |
| rule | how an operation's change follows from the changes of its inputs and their base values |
| one-channel, dense | a change that lives in one channel a coordinate, and is kept as that; a change of everything |
| travelling type | the type that dense changes are kept in between operations: the parameters' own, or bfloat16 |
| route | the operations that a parameter's changes pass |
| run | neighbours on a route that are carried out together, by one program if they can be merged |
| kink | where an operation has no derivative (ReLU at 0): base values must lie on the right side of it |
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dzhpc.engines.delta.engine import Delta
from dzhpc.engines.full import Full
from dzhpc.engines.losses import Loss
from dzhpc.engines.reuse import Reuse
from dzhpc.errors import InputError


def make_engine(
    kind: str,
    model: torch.nn.Module | Callable[[Tensor], Tensor],
    loss: str | Loss,
    precision: str = "fp32",
    memory_mb: float | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    queries: float = math.inf,
    emulate_bf16: bool = False,
) -> Full | Reuse | Delta:
    """An engine over ``model``.

    kind: "full" (any module or callable), "reuse" or "delta" (any torch.nn.Module that torch.fx can trace).
    loss: "cross_entropy", "mse", or a callable (outputs, targets) -> scalar over the batch.
    precision: "fp32": differences travel in the parameters' own dtype; "bf16" ("delta" only): in bfloat16.
    memory_mb: "reuse" refuses a batch whose cached features need more MiB than this (None: no limit); "delta" cuts its chunks
        so that their changes need no more (None: a fixed default for each device type).
    parameters: name -> tensor, for a callable that is not a module; these tensors are perturbed in place.
    queries: how many are to come ("delta"): few do not pay for a compiler. inf: compile in any case; 0: never.
    emulate_bf16: take "bf16" also where the hardware has no bfloat16 products; else that raises InputError.

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
        return Delta(model, loss, precision, memory_mb, queries=queries, emulate=emulate_bf16)
    raise InputError(f'engine = "{kind}": expected "full", "reuse" or "delta"')
