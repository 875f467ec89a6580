"""Data sets by name, from where they lie.

Root of the files: ``data.root``, else ``$DZHPC_DATA``, else ``data/``. Below it lies ``<name>.h5`` (packed) or the original
layout ``<name>/``. Nothing is downloaded here; ``python -m dzhpc.fetch`` does that.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dzhpc import config as configuration
from dzhpc.config import paths
from dzhpc.data import packed
from dzhpc.data.dataset import DataSet, Split, make_data_set
from dzhpc.data.images import cifar10_from, imagefolder_from
from dzhpc.errors import InputError
from dzhpc.method.seeds import generator


def load(section: configuration.Data, seed: int) -> DataSet:
    """The data set that ``[data]`` names, on the CPU. Raises InputError for missing or damaged files."""
    if ":" in section.name:
        data = _from_function(section.name)
    elif section.name in LOADERS:
        data = LOADERS[section.name](section)
    else:
        raise InputError(f'data.name = "{section.name}": expected {" | ".join(LOADERS)} or "package.module:function"')
    channels = data.train.images.shape[1]
    for key in ("mean", "std"):
        values = getattr(section, key)
        if values is not None:
            if len(values) != channels or (key == "std" and min(values) <= 0):
                raise InputError(
                    f"data.{key} = {values}: expected {channels} numbers, one a channel{', above 0' if key == 'std' else ''}"
                )
            setattr(data, key, torch.tensor(values))
    if section.train_limit is not None and section.train_limit < len(data.train):
        chosen = torch.randperm(len(data.train), generator=generator(seed, "train_limit"))[: section.train_limit]
        data.train = Split(data.train.images[chosen], data.train.labels[chosen])
    if section.test_limit is not None and section.test_limit < len(data.test):
        chosen = torch.arange(section.test_limit) * len(data.test) // section.test_limit  # image folders are sorted by class
        data.test = Split(data.test.images[chosen], data.test.labels[chosen])
    return data


def root_of(section: configuration.Data) -> Path:
    """Where data sets lie."""
    if section.root:
        return paths.absolute(section.root, f'data.root = "{section.root}"')
    return paths.absolute(os.environ.get("DZHPC_DATA") or "data", "DZHPC_DATA")


def _given(section: configuration.Data) -> Path:
    """The folder or file of data.path below the root, or the root."""
    return root_of(section) / paths.expanded(section.path or "", f'data.path = "{section.path}"')


def _digits(section: configuration.Data) -> DataSet:
    """scikit-learn's 1,797 handwritten digits (1 x 8 x 8): a fixed stratified split of 1,437 and 360.

    Read from its file, without the library: its import takes a second on every rank.
    """
    home = Path(importlib.util.find_spec("sklearn").origin).parent
    rows = np.loadtxt(home / "datasets" / "data" / "digits.csv.gz", delimiter=",").astype(np.int64)
    images, labels = (rows[:, :-1].reshape(-1, 1, 8, 8) * 15).astype(np.uint8), rows[:, -1]  # 0..16 -> 0..240
    train, test = _stratified(labels, 360)
    return make_data_set((images[train], labels[train]), (images[test], labels[test]), classes=[str(k) for k in range(10)])


def _stratified(labels: np.ndarray, test: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train and to test, each class in equal shares: those of scikit-learn's train_test_split, random_state=0."""
    draw, counts = np.random.RandomState(0), np.bincount(labels)

    def share(counts: np.ndarray, number: int) -> np.ndarray:
        """So many of each class: rounded down, and the largest remainders up; ties are drawn."""
        exact = counts / counts.sum() * number
        found = np.floor(exact)
        rest, left = exact - found, round(number - found.sum())
        for value in np.unique(rest)[::-1]:
            tied = np.flatnonzero(rest == value)
            up = draw.choice(tied, min(len(tied), left), replace=False) if left else []
            found[up] += 1
            left -= len(up)
        return found.astype(int)

    to_train = share(counts, len(labels) - test)
    to_test = share(counts - to_train, test)
    of_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    mixed = [one[draw.permutation(len(one))] for one in of_class]
    train = np.concatenate([one[:n] for one, n in zip(mixed, to_train, strict=True)])
    rest = np.concatenate([one[n : n + m] for one, n, m in zip(mixed, to_train, to_test, strict=True)])
    return draw.permutation(train), draw.permutation(rest)


def _cifar10(section: configuration.Data) -> DataSet:
    root = root_of(section)
    if (root / "cifar10.h5").exists():
        return packed.load(root / "cifar10.h5")
    fetch = f"get it with `python -m dzhpc.fetch cifar10 --root {paths.shown(root)}`"
    if not (root / "cifar10").is_dir():
        where = paths.shown(root)
        raise InputError(f"data.name = cifar10: neither {where}/cifar10.h5 nor {where}/cifar10 exists; {fetch}")
    return cifar10_from(root / "cifar10", fetch)


def _imagefolder(section: configuration.Data) -> DataSet:
    """``train/<class>/*`` and ``val/`` or ``test/`` in the same layout, resized and centre-cropped."""
    folder = _given(section)
    if not (folder / "train").is_dir() and not section.path:
        folder = folder / "imagefolder"
    if section.image_size is None:
        raise InputError("data.image_size: needed for data.name = imagefolder, the pixels of a side after resizing")
    return imagefolder_from(folder, section.image_size)


def _packed(section: configuration.Data) -> DataSet:
    path = _given(section)
    return packed.load(path if section.path or path.is_file() else path / "packed.h5")


def _from_function(name: str) -> DataSet:
    """The user's own: () -> ((train images, labels), (test images, labels)), see :func:`dzhpc.data.make_data_set`."""
    given = configuration.called(f"data.name = {name}", configuration.import_object(name, "data.name"))
    try:
        (train, test) = given
        return make_data_set(train, test)
    except InputError as error:
        raise InputError(str(error) if name in str(error) else f"data.name = {name}: {error}") from None
    except (TypeError, ValueError) as error:
        raise InputError(
            f'data.name = "{name}": {error}; expected () -> ((images, labels), (images, labels)), images [N, C, H, W]'
        ) from None


LOADERS: dict[str, Callable[[configuration.Data], DataSet]] = {
    "digits": _digits, "cifar10": _cifar10, "imagefolder": _imagefolder, "packed": _packed,
}  # fmt: skip
