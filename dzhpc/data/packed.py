"""Packed data: a data set as one HDF5 file, which spares a parallel file system one of 60,000 small ones."""

from pathlib import Path

import numpy as np

from dzhpc.data.dataset import DataSet, make_data_set
from dzhpc.errors import InputError
from dzhpc.files import h5

KIND = "dzhpc-data"


def save(path: Path, data_set: DataSet) -> None:
    """Write a data set: for each split images uint8 [N, H, W, C] and labels int64 [N]; mean, std and classes as attributes.

    Raises InputError if it cannot be written; then the old file, if any, is whole.
    """

    if path.exists() and not (path.is_file() and h5.is_ours(path)):
        raise InputError(f"{path}: was not written by dzhpc and would be lost; move it, or choose another name")

    def fill(file: h5.File) -> None:
        mean, std = (np.asarray(values, float) for values in (data_set.mean, data_set.std))
        file.attrs.update(mean=mean, std=std, classes=data_set.classes)
        for name, split in (("train", data_set.train), ("test", data_set.test)):
            file[f"{name}/images"] = split.images.permute(0, 2, 3, 1).numpy()
            file[f"{name}/labels"] = split.labels.numpy()

    h5.write(path, KIND, fill, InputError)


def load(path: str | Path) -> DataSet:
    """The data set in a file, on the CPU. Raises InputError if the file is missing, damaged, or no packed data."""
    with h5.opened(Path(path), KIND, InputError) as file:
        splits = [(file[f"{name}/images"][()].transpose(0, 3, 1, 2), file[f"{name}/labels"][()]) for name in ("train", "test")]
        classes = [str(name) for name in file.attrs["classes"]]
        return make_data_set(*splits, classes, file.attrs["mean"], file.attrs["std"])
