"""Checkpoints: all that a run is, after a step."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dzhpc import config as configuration
from dzhpc.config.paths import shown
from dzhpc.errors import CheckpointError, InputError
from dzhpc.files import h5
from dzhpc.files.lpr import get_lpr, put_lpr
from dzhpc.files.tensors import get_tensors, put_tensors
from dzhpc.method.estimators import Partial
from dzhpc.method.scores import LPR

KIND = "dzhpc-checkpoint"


@dataclass
class State:
    """All that a run is, after a step: what a checkpoint holds."""

    config: str  # TOML
    history: list[str]  # the configs of earlier launches
    step: int
    epoch: float
    queries: int
    wall_time_s: float
    run_uuid: str
    model_sha256: str
    seed: int
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]  # slot -> parameter name -> tensor
    coordinates: np.ndarray  # S, sorted
    lpr: LPR | None
    sizes: Tensor | None = None  # adaptive S: what coordinates have given [d]
    env: dict[str, str] = field(default_factory=dict)  # for information
    partial: Partial | None = None  # of the next step, if it was left unfinished; S is then that step's
    estimator: dict[str, Tensor] = field(default_factory=dict)  # what it knows that follows from nothing else here


def save_checkpoint(path: Path, state: State) -> None:
    """Write a checkpoint atomically. Raises CheckpointError if it cannot be written; then the old file, if any, is whole."""

    def fill(file: h5.File) -> None:
        file["config"] = state.config
        for k, text in enumerate(state.history, 1):
            file[f"config-history/{k}"] = text
        attrs = file.create_group("state").attrs
        for name in ("step", "epoch", "queries", "wall_time_s", "run_uuid", "model_sha256", "seed"):
            attrs[name] = getattr(state, name)
        put_tensors(file.create_group("params"), state.params)
        put_tensors(file.create_group("buffers"), state.buffers)
        optimizer = file.create_group("optimizer")
        for slot, tensors in state.optimizer.items():
            put_tensors(optimizer.create_group(slot), tensors)
        file["coordinates/S"] = state.coordinates.astype(np.int64)
        if state.sizes is not None:
            file["coordinates/sizes"] = state.sizes.numpy()
        if state.lpr is not None:
            put_lpr(file.create_group("lpr"), state.lpr)
        file.create_group("env").attrs.update(state.env)
        if state.estimator:
            put_tensors(file.create_group("estimator"), state.estimator)
        if state.partial is not None:
            file["partial/values"], file["partial/done"] = state.partial.values, state.partial.done

    h5.write(path, KIND, fill, CheckpointError)


def load_checkpoint(path: str | Path) -> State:
    """Read a checkpoint (tensors on the CPU). Raises CheckpointError if it is missing, damaged, or of another format."""
    with h5.opened(Path(path), KIND, CheckpointError) as file:
        attrs = file["state"].attrs
        history = file.get("config-history", {})
        return State(
            config=file["config"].asstr()[()],
            history=[history[k].asstr()[()] for k in sorted(history, key=int)],
            **{name: int(attrs[name]) for name in ("step", "queries", "seed")},
            **{name: float(attrs[name]) for name in ("epoch", "wall_time_s")},
            **{name: str(attrs[name]) for name in ("run_uuid", "model_sha256")},
            params=get_tensors(file["params"]),
            buffers=get_tensors(file["buffers"]),
            optimizer={slot: get_tensors(group) for slot, group in file["optimizer"].items()},
            coordinates=file["coordinates/S"][()],
            sizes=torch.from_numpy(file["coordinates/sizes"][()]) if "coordinates/sizes" in file else None,
            lpr=get_lpr(file["lpr"]) if "lpr" in file else None,
            env={k: str(v) for k, v in file["env"].attrs.items()},
            partial=Partial(file["partial/values"][()], file["partial/done"][()]) if "partial" in file else None,
            estimator=get_tensors(file["estimator"]) if "estimator" in file else {},
        )


def config_of(state: State, source: str) -> configuration.Config:
    """The input that a checkpoint was written with. Raises CheckpointError if this program does not understand it."""
    try:
        return configuration.parse_written(state.config, shown(source))
    except InputError as error:
        raise CheckpointError(f"{error}; it was written by another version of dzhpc") from None
