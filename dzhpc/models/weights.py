"""Weights from elsewhere into a model: starting weights (checkpoints of ours, torch's files), a checkpoint's tensors."""

from pathlib import Path

import torch
from torch import Tensor, nn

from dzhpc.config import paths
from dzhpc.errors import CheckpointError, InputError
from dzhpc.files import h5
from dzhpc.files.runfolder import load_state
from dzhpc.models import statedict


def load_weights(model: nn.Module, path: str) -> None:
    """Copy the weights in ``path``: a checkpoint or run folder of ours, or a torch state_dict.

    The latter may lie deeper in dictionaries, and its names may be longer at their front, see :mod:`dzhpc.models.statedict`.
    Raises InputError that says what the file holds.
    """
    file = paths.absolute(path, f"model.weights = {path}")
    try:
        if is_ours(file):
            _, state = load_state(file)
            assign(_part_for(model, {**state.params, **state.buffers}), state.params, state.buffers)
        else:
            content = statedict.read(file)
            inner = dict(model.named_children()).get("denoiser")
            try:
                model.load_state_dict(statedict.fitted(content, model), strict=False)  # it fits, but for BatchNorm's counters
            except ValueError:
                if inner is None:
                    raise
                inner.load_state_dict(statedict.fitted(content, inner), strict=False)
    except OSError as error:
        raise InputError(f"model.weights = {path}: cannot be read ({error.strerror or error})") from None
    except (CheckpointError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split()).removeprefix(f"{paths.shown(file)}: ")
        raise InputError(f"model.weights = {path}: {said}") from None


def _part_for(model: nn.Module, weights: dict) -> nn.Module:
    """The denoiser inside a model, where the weights are a denoiser's alone; else the model."""
    inner = dict(model.named_children()).get("denoiser")
    return inner if inner is not None and set(weights) == set(inner.state_dict()) else model


def is_ours(path: str | Path) -> bool:
    """Whether this is a run folder, or begins like a checkpoint of ours. Raises OSError."""
    return Path(path).is_dir() or h5.is_ours(path)


@torch.no_grad()
def assign(model: nn.Module, params: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
    """Copy a checkpoint's tensors into the model, tied and non-persistent ones included.

    Raises CheckpointError if they differ in name or shape.
    """
    for kind, own, given in (
        ("parameter", dict(model.named_parameters()), params),
        ("buffer", dict(model.named_buffers()), buffers),
    ):
        wrong = sorted(
            name
            for name in own.keys() | given.keys()
            if name not in own or name not in given or own[name].shape != given[name].shape
        )
        if wrong:
            raise CheckpointError(f"the checkpoint is of another model: {kind} {wrong[0]} differs ({len(wrong)} in all)")
        for name, tensor in own.items():
            tensor.copy_(given[name])
