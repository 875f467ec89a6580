"""Data sets, resident on the device as uint8; batches are functions of (seed, step).

Root of the files: ``data.root``, else ``$DZHPC_DATA``, else ``data/``. Below it lies ``<name>.h5`` (packed) or the original
layout ``<name>/``. Nothing is downloaded here; ``python -m dzhpc.fetch`` does that.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dzhpc import config as configuration
from dzhpc.errors import InputError
from dzhpc.files import store
from dzhpc.method.seeds import generator

PAD = 4  # pixels of zero padding before the random crop
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass
class Split:
    """images [N, C, H, W], uint8 (pixels) or floating point (ready inputs); labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class DataSet:
    """A training and a test split with their normalisation; ``classes`` are names."""

    train: Split
    test: Split
    mean: Tensor  # [C], of pixels in [0, 1]
    std: Tensor
    classes: list[str]

    def to(self, device: torch.device) -> "DataSet":
        """The same data set on another device."""
        move = lambda s: Split(s.images.to(device), s.labels.to(device))  # noqa: E731
        return DataSet(move(self.train), move(self.test), self.mean.to(device), self.std.to(device), self.classes)

    def normalise(self, images: Tensor) -> Tensor:
        """float32 inputs [B, C, H, W] from uint8 pixels; floating-point images pass as float32."""
        if images.dtype != torch.uint8:
            return images.float()
        return (images.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]


class Order:
    """Which of ``count`` training examples belong to a step, all shuffled anew each epoch: a function of (seed, step).

    The remainder of an epoch is left out, another one each epoch.
    """

    def __init__(self, count: int, batch_size: int, seed: int, device: torch.device):
        self._count, self._batch_size, self._seed, self._device = count, batch_size, seed, device
        self.steps_per_epoch = count // batch_size
        self._epoch, self._order = -1, torch.empty(0)

    def chosen(self, step: int) -> Tensor:
        """int64 [batch_size]."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = torch.randperm(self._count, generator=generator(self._seed, "shuffle", epoch))
            self._epoch, self._order = epoch, order.to(self._device)
        return self._order[k * self._batch_size : (k + 1) * self._batch_size]


class Batches:
    """Training batches of a data set: shuffling, crop and flip as batched tensor code on the data's device."""

    def __init__(self, data: DataSet, batch_size: int, seed: int, augment: bool):
        self.data, self.batch_size, self.seed, self.augment = data, batch_size, seed, augment
        if batch_size > len(data.train):
            raise InputError(
                f"data.batch_size = {batch_size}: the training set has {len(data.train)} images; choose a smaller batch"
            )
        self._order = Order(len(data.train), batch_size, seed, data.train.labels.device)
        self.steps_per_epoch = self._order.steps_per_epoch

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(inputs float32 [B, C, H, W], labels [B]) of a step."""
        chosen = self._order.chosen(step)
        images = self.data.train.images[chosen]
        if self.augment:
            images = crop_and_flip(images, generator(self.seed, "augment", step))
        return self.data.normalise(images), self.data.train.labels[chosen]

    def balanced(self, number: int) -> tuple[Tensor, Tensor]:
        """The ``number``-th class-balanced batch for pruning scores, without augmentation: equally many images a class."""
        labels = self.data.train.labels.cpu()
        present = labels.unique()
        share = min(max(1, self.batch_size // len(present)), int(labels.bincount()[present].min()))
        draw = generator(self.seed, "balanced", number)
        chosen = []
        for label in present:
            members = (labels == label).nonzero()[:, 0]
            chosen.append(members[torch.randperm(len(members), generator=draw)[:share]])
        picked = torch.cat(chosen).to(self.data.train.labels.device)
        return self.data.normalise(self.data.train.images[picked]), self.data.train.labels[picked]


def crop_and_flip(images: Tensor, draw: torch.Generator) -> Tensor:
    """Random crop after zero padding by PAD pixels, and random horizontal flip: [B, C, H, W] -> same, any dtype."""
    b, c, h, w = images.shape
    shift = torch.randint(0, 2 * PAD + 1, (2, b), generator=draw).to(images.device)
    flip = torch.randint(0, 2, (b,), generator=draw).bool().to(images.device)
    rows = shift[0][:, None] + torch.arange(h, device=images.device)
    columns = torch.arange(w, device=images.device)
    columns = shift[1][:, None] + torch.where(flip[:, None], columns.flip(0), columns)
    padded = F.pad(images, (PAD, PAD, PAD, PAD))
    k = torch.arange(b, device=images.device)
    return padded[
        k[:, None, None, None],
        torch.arange(c, device=images.device)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


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
    return Path(section.root or os.environ.get("DZHPC_DATA") or "data")


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
        return _read_packed(root / "cifar10.h5")
    fetch = f"get it with `python -m dzhpc.fetch cifar10 --root {root}`"
    if not (root / "cifar10").is_dir():
        raise InputError(f"data.name = cifar10: neither {root / 'cifar10.h5'} nor {root / 'cifar10'} exists; {fetch}")
    return cifar10_from(root / "cifar10", fetch)


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


def _imagefolder(section: configuration.Data) -> DataSet:
    """``train/<class>/*`` and ``val/`` or ``test/`` in the same layout, resized and centre-cropped."""
    folder = root_of(section) / (section.path or "")
    if not (folder / "train").is_dir() and not section.path:
        folder = folder / "imagefolder"
    if section.image_size is None:
        raise InputError("data.image_size: needed for data.name = imagefolder, the pixels of a side after resizing")
    return imagefolder_from(folder, section.image_size)


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


def _packed(section: configuration.Data) -> DataSet:
    path = root_of(section) / (section.path or "")
    return _read_packed(path if path.is_file() else path / "packed.h5" if not section.path else path)


def _read_packed(path: Path) -> DataSet:
    splits, mean, std, classes = store.load_packed(path)
    train, test = ((images.transpose(0, 3, 1, 2), labels) for images, labels in (splits["train"], splits["test"]))
    return make_data_set(train, test, classes, mean, std)


def _from_function(name: str) -> DataSet:
    """The user's own: () -> ((train images, labels), (test images, labels)); images uint8 or float [N, C, H, W]."""
    try:
        (train, test) = configuration.import_object(name, "data.name")()
        return make_data_set(train, test)
    except (TypeError, ValueError) as error:
        raise InputError(
            f'data.name = "{name}": {error}; expected () -> ((images, labels), (images, labels)), images [N, C, H, W]'
        ) from None


def make_data_set(train, test, classes: list[str] | None = None, mean=None, std=None) -> DataSet:
    """A checked data set from two pairs (images [N, C, H, W], labels [N]), numpy or torch.

    Unset mean and std are measured on the training images. Raises InputError for shapes or labels that do not fit.
    """
    splits = [
        Split(
            torch.as_tensor(np.asarray(images)).clone(memory_format=torch.contiguous_format),
            torch.as_tensor(np.asarray(labels)).long(),
        )
        for images, labels in (train, test)
    ]
    for part, split in zip(("training", "test"), splits, strict=True):
        if split.images.ndim < 2 or len(split.images) != len(split.labels) or len(split) == 0:
            raise InputError(
                f"the {part} set has images {list(split.images.shape)}, labels {list(split.labels.shape)}; not as many of each"
            )
    top = int(max(split.labels.max() for split in splits)) + 1
    classes = classes or [str(k) for k in range(top)]
    if top > len(classes) or min(int(split.labels.min()) for split in splits) < 0:
        low = min(int(split.labels.min()) for split in splits)
        raise InputError(f"labels run from {low} to {top - 1}, but the data set names {len(classes)} classes")
    images = splits[0].images
    channels = images.shape[1]
    if mean is None or std is None:
        if images.dtype == torch.uint8:
            pixels = images.transpose(0, 1).reshape(channels, -1).double() / 255
            mean, std = pixels.mean(1), pixels.std(1).clamp_min(1e-6)
        else:
            mean, std = np.zeros(channels), np.ones(channels)
    return DataSet(*splits, torch.as_tensor(np.asarray(mean)).float(), torch.as_tensor(np.asarray(std)).float(), list(classes))


LOADERS: dict[str, Callable[[configuration.Data], DataSet]] = {
    "digits": _digits, "cifar10": _cifar10, "imagefolder": _imagefolder, "packed": _packed,
}  # fmt: skip
