"""Data sets from the files they are published as: CIFAR-10's batches, folders of images."""

from pathlib import Path

import numpy as np
import torch

from dzhpc.data.dataset import DataSet, make_data_set
from dzhpc.errors import InputError

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def cifar10_from(folder: Path, advice: str) -> DataSet:
    """CIFAR-10 from the official python batches below ``folder``, their md5 sums verified by torchvision."""
    from torchvision.datasets import CIFAR10

    try:
        train, test = (CIFAR10(str(folder), train=train, download=False) for train in (True, False))
    except (RuntimeError, OSError, EOFError) as error:
        raise InputError(
            f"{folder / CIFAR10.base_folder}: incomplete or damaged ({' '.join(str(error).split())}); {advice}"
        ) from None
    splits = [(part.data.transpose(0, 3, 1, 2), np.asarray(part.targets)) for part in (train, test)]
    return make_data_set(*splits, classes=train.classes, mean=CIFAR10_MEAN, std=CIFAR10_STD)


def imagefolder_from(folder: Path, size: int) -> DataSet:
    """A data set from an image folder; greyscale images become RGB. Raises InputError for a layout torchvision refuses."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    test = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or test is None:
        raise InputError(
            f"{folder}: expected train/<class>/ and val/<class>/ (or test/) with images; check data.root and data.path"
        )
    shape = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    splits = []
    try:
        for part in (folder / "train", test):
            found = ImageFolder(str(part), transform=shape)
            splits.append((torch.stack([image for image, _ in found]).numpy(), np.asarray(found.targets)))
            splits[-1] += (found.classes,)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{folder}: cannot be read as an image folder ({' '.join(str(error).split())})") from None
    if splits[0][2] != splits[1][2]:
        raise InputError(f"{folder}: train/ has the classes {splits[0][2]}, {test.name}/ has {splits[1][2]}; they must agree")
    return make_data_set(splits[0][:2], splits[1][:2], classes=splits[0][2])
