"""What must hold for a run's numbers to be trusted; each check raises on all ranks together."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dzhpc import config as configuration
from dzhpc.config.paths import expanded, shown
from dzhpc.data import root_of
from dzhpc.errors import CheckpointError, NumericalError, ReplicaError
from dzhpc.files.checkpoint import State, config_of
from dzhpc.job.world import World
from dzhpc.method.estimators import Estimator
from dzhpc.models.identity import model_sha256, tensors_sha256
from dzhpc.tasks import Task
from dzhpc.training.distribution import Distribution
from dzhpc.training.shards import Shards

log = logging.getLogger("dzhpc")


def check_restart(state: State, source: str, task: Task) -> None:
    """Raise CheckpointError unless a checkpoint belongs to this task: same frozen keys, same model.

    A file that was moved may be named by its new place, which is a warning.
    """
    written, source = config_of(state, source), shown(source)
    for key, old, new in configuration.frozen_changes(written, task.config):
        if key in ("task.classifier", "data.path") and _was_moved(key, written, task.config):
            log.warning("%s was %s, which is no longer there, now %s: bits may differ if that is another", key, old, new)
            continue
        raise CheckpointError(f"{source} was written with {key} = {old!r}, now {new!r}: frozen keys cannot change on restart")
    if state.model_sha256 != model_sha256(task.model):
        other = "theta0" if task.config.task.kind == "objective" else f"model than model.name = {task.config.model.name!r} builds"
        raise CheckpointError(f"{source} is of another {other} now: names, shapes or types differ")


def _was_moved(key: str, old: configuration.Config, new: configuration.Config) -> bool:
    """Whether the file or folder that ``key`` names is gone from its old place, and there is one at the new one."""
    before, now = (_place(key, config) for config in (old, new))
    return before is not None and now is not None and now.exists() and not before.exists()


def _place(key: str, config: configuration.Config) -> Path | None:
    if key == "data.path":
        return root_of(config.data) / expanded(config.data.path) if config.data.path else None
    return configuration.path_of(config, key)


def check_replicas(world: World, step: int, tensors: dict[str, torch.Tensor]) -> None:
    """Raise ReplicaError unless all ranks hold the same tensors, bit for bit. Collective."""
    own = tensors_sha256(tensors, content=True)
    number = np.frombuffer(bytes.fromhex(own), np.uint8).astype(np.int64)
    if np.array_equal(world.minimum(number), -world.minimum(-number)):
        return
    hashes = world.allgather(own)
    different = [rank for rank, value in enumerate(hashes) if value != hashes[0]]
    if different:
        raise ReplicaError(
            f"step {step}: the state of rank {', '.join(map(str, different))} differs from rank 0's; "
            f"look for differing hardware, libraries or run.threads, and restart from the last checkpoint"
        )


@torch.no_grad()
def follow_root(world: World, config: configuration.Config, tensors: dict[str, torch.Tensor]) -> None:
    """With run.mixed_nodes replicas become the root's: other processors draw and update them in other last digits. Collective."""
    if not config.run.mixed_nodes or world.size == 1:
        return
    for tensor in tensors.values():
        held = tensor.detach().cpu().contiguous()
        world.bcast_into(held.reshape(-1).view(torch.uint8).numpy())
        tensor.copy_(held)


def check_finite(
    step: int, loss: float, estimate: torch.Tensor, estimator: Estimator, distribution: Distribution, advice: Callable[..., str]
) -> None:
    """Raise NumericalError that names rank and coordinate: a NaN in one slice reaches all ranks through the sum. Collective.

    advice: what to do, called with whether anything was perturbed.
    """
    bad = (~torch.isfinite(estimate)).nonzero().flatten().tolist()
    if not bad and math.isfinite(loss):
        return
    if not math.isfinite(loss):
        raise NumericalError(
            f"step {step}: the loss at theta is {loss} on every rank, before any coordinate was perturbed; {advice(False)}"
        )
    if (unit := distribution.bad_unit) is not None:
        rank, what = distribution.owner_of(unit), distribution.place(unit, estimator)
    else:
        rank, what = 0, f"the gradient at {distribution.index.describe(int(distribution.coords[bad[0]]))}"
    share = f"{len(bad)} of {len(estimate)} coordinates"
    where = f"step {step}" if rank < 0 else f"step {step}, rank {rank}"  # it was known before this launch
    raise NumericalError(f"{where}: {what} is not finite ({share}); {advice()}")


def check_changes(world: World, step: int, estimate: torch.Tensor, estimator: Estimator, task: Task, shards: Shards) -> None:
    """Raise NumericalError where no perturbation changed the loss: it is lost under all, or the black box answers alike.

    Collective: all ranks hold the same estimate, so that all of them ask each other or none does.
    """
    if not estimator.asks or not len(estimate) or estimate.any():
        return
    n, units = estimator.perturbations(len(estimate)), estimator.units(len(estimate))
    if n and sum(world.allgather(shards.lost)) >= min(n, units) * shards.count:  # by central differences either side will do
        raise NumericalError(
            f"step {step}: all {n} perturbed parameters are infeasible, or diverge; lower zo.mu (now {estimator.zo.mu:g})"
        )
    if task.cost.box:
        raise NumericalError(
            f"step {step}: {task.cost.box} answered the same under all {n or ''} perturbations: quantised answers? "
            f"raise zo.mu (now {estimator.zo.mu:g})".replace("  ", " ")
        )
