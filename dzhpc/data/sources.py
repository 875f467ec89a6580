"""Data sets by name, from where they lie.

Root of the files: ``data.root``, else ``$DZHPC_DATA``, else ``data/``. Below it lies ``<name>.h5`` (packed) or the original
layout ``<name>/``. Nothing is downloaded here; ``python -m dzhpc.fetch`` does that.
"""

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
    """scikit-learn's 1,797 handwritten digits (1 x 8 x 8): a fixed stratified split of 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * 15).astype(np.uint8)[:, None]  # 0..16 -> 0..240
    parts = train_test_split(images, digits.target, test_size=360, stratify=digits.target, random_state=0)
    return make_data_set((parts[0], parts[2]), (parts[1], parts[3]), classes=[str(k) for k in range(10)])


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
