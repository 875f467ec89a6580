"""Reference trajectories: what a corrected solver should reproduce, from a file that ``python -m dzhpc.simulate`` wrote."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dzhpc.config import Data
from dzhpc.config.paths import shown
from dzhpc.data import root_of
from dzhpc.errors import InputError
from dzhpc.files import h5

KIND = "dzhpc-reference"
SPLITS = ("train", "valid", "test")


@dataclasses.dataclass
class Trajectories:
    """Down-sampled states [S, F, ...] float32 of S simulations, F frames each, and the parameter of each [S] float64."""

    states: Tensor
    parameters: Tensor

    def to(self, device: torch.device) -> "Trajectories":
        """A copy on a device."""
        return Trajectories(self.states.to(device), self.parameters.to(device))


@dataclasses.dataclass
class Reference:
    """The three splits; ``valid`` chooses the model, ``test`` is never looked at before.

    staggered: states are the packed faces of :func:`dzhpc.tasks.sol.wake.pack`. about: the constants the file was made with.
    """

    train: Trajectories
    valid: Trajectories
    test: Trajectories
    staggered: bool
    about: dict[str, object]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a state."""
        return tuple(self.train.states.shape[2:])

    def to(self, device: torch.device) -> "Reference":
        """A copy on a device."""
        return dataclasses.replace(self, **{split: getattr(self, split).to(device) for split in SPLITS})

    def where(self) -> Tensor:
        """Which entries of a state hold a value, bool [...]: all, but of a staggered one those of faces that do not exist."""
        where = torch.ones(self.shape, dtype=torch.bool, device=self.train.states.device)
        if self.staggered:
            where[0, :, -1] = where[1, -1] = False
        return where

    def scales(self) -> Tensor:
        """sigma [C] float64: std of |x| over the training states, per channel: a state's first axis, if it has more than one."""
        states, where = self.train.states, self.where()
        if states.ndim == 3:
            states, where = states[:, :, None], where[None]
        return torch.stack([states[:, :, c][..., where[c]].double().abs().std(correction=0) for c in range(len(where))])

    def parameter_scale(self) -> float:
        """Standard deviation of the training parameters; 1 if they are equal."""
        return float(self.train.parameters.std(correction=0)) or 1.0


def find(section: Data) -> Reference:
    """The reference that ``[data]`` names, on the CPU. Raises InputError as :func:`load` does."""
    path = root_of(section) / f"{section.name}.h5"
    if not path.exists():
        raise InputError(f"{shown(path)}: no such file; make it with `python -m dzhpc.simulate INPUT -o {shown(path)}`")
    return load(path)


def load(path: str | Path) -> Reference:
    """Read a reference file. Raises InputError if it is missing, damaged, or something else."""
    splits, about = read(path)
    parts = {name: Trajectories(torch.from_numpy(states), torch.from_numpy(p)) for name, (states, p) in splits.items()}
    return Reference(**parts, staggered=bool(about["staggered"]), about=about)


def save(path: Path, splits: Mapping[str, tuple[np.ndarray, np.ndarray]], about: Mapping[str, object]) -> None:
    """Write trajectories: for train, valid and test states [S, F, ...] and parameters [S]; ``about`` becomes attributes.

    Raises InputError if they cannot be written; then the old file, if any, is whole.
    """

    def fill(file: h5.File) -> None:
        file.create_group("about").attrs.update(about)
        for split, (states, parameters) in splits.items():
            file[f"{split}/states"] = np.asarray(states, np.float32)
            file[f"{split}/parameters"] = np.asarray(parameters, np.float64)

    h5.write(path, KIND, fill, InputError)


def read(path: str | Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, object]]:
    """(splits, about), as given to :func:`save`. Raises InputError."""
    with h5.opened(Path(path), KIND, InputError) as file:
        splits = {s: (file[f"{s}/states"][()], file[f"{s}/parameters"][()]) for s in SPLITS}
        return splits, h5.attributes(file["about"])
