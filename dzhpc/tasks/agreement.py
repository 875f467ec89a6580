"""What every rank makes by itself, from files and user code, must be the same on all: data, starting values, the first loss."""

import logging
import math
from collections.abc import Mapping

from torch import Tensor

from dzhpc.config import Config, is_function
from dzhpc.errors import InputError
from dzhpc.job.world import World
from dzhpc.models.identity import tensors_sha256

log = logging.getLogger("dzhpc")
ROUNDING = 1e-5  # of a loss: what two computations of it may differ by, whatever adds its terms up


def check_made(world: World, made: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise InputError for the first of ``made`` (see :meth:`dzhpc.tasks.Task.made`) that ranks do not share. Collective."""
    if world.size == 1:
        return
    for name, tensors in made.items():
        hashes = world.allgather(tensors_sha256(tensors, content=True))
        other = [rank for rank, value in enumerate(hashes) if value != hashes[0]]
        if other:
            advice = "seed what it draws, the same on every rank" if ":" in name else "is it the same file on every node?"
            raise InputError(f"{name}: gives something else on rank {', '.join(map(str, other))} than on rank 0; {advice}")


def check_losses(world: World, config: Config, losses: list[float]) -> None:
    """Compare what the loss was at one theta on one batch, each time that each rank asked.

    A difference beyond rounding raises InputError, a smaller one is a warning. Collective.
    """
    gathered = world.allgather(losses)
    first = gathered[0][0]
    for rank, values in enumerate(gathered):
        for value in values:
            if value == first or (math.isnan(value) and math.isnan(first)):
                continue
            where = f"{value!r} on rank {rank}" if rank else f"then {value!r}"
            code = " or ".join(f"{key} = {name}" for key, name in user_code(config).items())
            text = f"{code or 'the loss'}: {first!r} and {where} for the same theta and the same batch"
            if not abs(value - first) <= ROUNDING * min(abs(value), abs(first)):
                raise InputError(f"{text}; a loss must draw no random numbers but by a seed that follows from the step")
            if world.is_root:
                log.warning("%s: bits will not come again", text)
            return


def user_code(config: Config) -> dict[str, str]:
    """key -> ``package.module:Name``, or the words of a program, for all that the input names of the user's own."""
    sections = {"task": config.task.model_dump(), "model": {"name": config.model.name}, "data": {"name": config.data.name}}
    values = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    found = {key: value for key, value in values.items() if isinstance(value, str) and is_function(value)}
    command = getattr(config.task, "command", None)
    return found | ({"task.command": " ".join(command)} if command else {})
