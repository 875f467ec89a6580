"""A data set: images and labels of its two splits, their normalisation, the names of the classes."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dzhpc.errors import InputError
from dzhpc.method.arrays import to_tensor


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

    def tensors(self) -> dict[str, Tensor]:
        """All that is in it, by name."""
        splits = {"train": self.train, "test": self.test}
        return {f"{n}/{k}": t for n, s in splits.items() for k, t in (("images", s.images), ("labels", s.labels))}

    @property
    def bytes(self) -> int:
        """Of all images and labels."""
        return sum(t.nbytes for t in self.tensors().values())

    def normalise(self, images: Tensor) -> Tensor:
        """float32 inputs [B, C, ...], new ones: (pixels - mean) / std, of uint8 after they were divided by 255.

        Floating-point images are taken as they are, where mean and std are not given (0 and 1).
        """
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        if images.dtype != torch.uint8 and not self.mean.any() and bool((self.std == 1).all()):
            return pixels.clone() if pixels is images else pixels  # a network may compute in place
        shape = [-1, *[1] * (images.ndim - 2)]
        return (pixels - self.mean.view(shape)) / self.std.view(shape)


def make_data_set(train, test, classes: list[str] | None = None, mean=None, std=None) -> DataSet:
    """A checked data set from two pairs (images, labels), numpy or torch.

    images: uint8 [N, C, H, W]; integers of another width, which must lie in 0..255; booleans, black and white; or floating point
    [N, ...], ready inputs. labels: whole numbers from 0, [N] or [N, 1]. Unset mean and std are measured on uint8 training images.
    Raises InputError for what does not fit.
    """
    splits = [_split(part, *given) for part, given in (("training", train), ("test", test))]
    kinds = [(str(split.images.dtype)[6:], list(split.images.shape[1:])) for split in splits]
    if kinds[0] != kinds[1]:
        raise InputError("the training images are {} {}, the test images {} {}; expected the same".format(*kinds[0], *kinds[1]))
    classes = classes or _numbered(*(split.labels for split in splits))
    low, top = (int(f(f(split.labels) for split in splits)) for f in (min, max))
    if top >= len(classes) or low < 0:
        raise InputError(f"labels run from {low} to {top}, but the data set names {len(classes)} classes")
    images = splits[0].images
    if mean is None or std is None:
        measured = np.zeros(images.shape[1]), np.ones(images.shape[1])
        if images.dtype == torch.uint8:
            pixels = images.transpose(0, 1).reshape(images.shape[1], -1).double() / 255
            measured = pixels.mean(1), pixels.std(1).clamp_min(1e-6)
        mean, std = (own if given is None else given for own, given in zip(measured, (mean, std), strict=True))
    return DataSet(*splits, torch.as_tensor(np.asarray(mean)).float(), torch.as_tensor(np.asarray(std)).float(), list(classes))


def _split(part: str, images: object, labels: object) -> Split:
    """A checked split. Raises InputError that names ``part`` and what was found."""
    found = {}
    for name, given in (("images", images), ("labels", labels)):
        try:
            found[name] = to_tensor(given)
        except ValueError as error:
            raise InputError(f"the {part} {name} are {error}") from None
    return _paired(part, _pixels(f"the {part} images", found["images"]), _numbers(f"the {part} labels", found["labels"]))


def _paired(part: str, images: Tensor, labels: Tensor) -> Split:
    if len(images) != len(labels) or len(labels) == 0:
        raise InputError(
            f"the {part} set has images {list(images.shape)}, labels {list(labels.shape)}; not as many of each, or none"
        )
    return Split(images, labels)


def _pixels(name: str, images: Tensor) -> Tensor:
    """uint8 [N, C, H, W], or finite float32 [N, C, ...]."""
    if images.is_floating_point():
        images = images.float()
        finite = torch.isfinite(images)
        if not finite.all():
            raise InputError(f"{name}: image {int((~finite).nonzero()[0, 0])} holds a number that is not finite")
    elif images.dtype == torch.bool:
        images = images.to(torch.uint8) * 255
    elif images.numel() and images.dtype != torch.uint8:
        low, high = int(images.min()), int(images.max())
        if low < 0 or high > 255:
            dtype = str(images.dtype)[6:]
            raise InputError(f"{name} are {dtype} from {low} to {high}; expected uint8 pixels, or floating-point inputs")
        images = images.to(torch.uint8)
    if images.ndim < 2 or 0 in images.shape[1:] or (images.dtype == torch.uint8 and images.ndim != 4):
        raise InputError(f"{name} are {list(images.shape)}; expected [N, C, H, W] (floating-point ones: [N, ...])")
    if _channels_last(images):
        raise InputError(
            f"{name} are {list(images.shape)}, which looks like [N, H, W, C]; transpose(0, 3, 1, 2) gives [N, C, H, W]"
        )
    return images


def _channels_last(images: Tensor) -> bool:
    """Whether the last axis of images looks like channels: few of them, behind two larger axes, height and width."""
    if images.ndim != 4:
        return False
    h, w, c = images.shape[1:]
    return c in (1, 3, 4) and min(h, w) > 4 and (h == w or (c > 1 and images.dtype == torch.uint8))


def _numbers(name: str, labels: Tensor) -> Tensor:
    """int64 [N]."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise InputError(f"{name} are {list(labels.shape)}; expected [N], a class number each (of one-hot labels their argmax)")
    whole = labels.long()
    if labels.is_floating_point() and not torch.equal(whole.to(labels.dtype), labels):
        wrong = labels[whole.to(labels.dtype) != labels][0]
        raise InputError(f"{name} hold {float(wrong):g}; expected whole numbers from 0, a class each")
    return whole


def _numbered(train: Tensor, test: Tensor) -> list[str]:
    """Classes called by their numbers. Raises InputError for labels that do not count from 0, or that only the test set has."""
    low, top = int(min(train.min(), test.min())), int(max(train.max(), test.max()))
    if low != 0:
        raise InputError(f"labels run from {low} to {top}; expected them to count classes from 0")
    unknown = sorted(set(test.tolist()) - set(train.tolist()))
    if unknown:
        raise InputError(f"label {unknown[0]} is in the test set alone; no training image has it")
    if top >= len(train):
        raise InputError(
            f"labels run to {top}, but there are {len(train)} training images; expected them to count classes from 0"
        )
    return [str(k) for k in range(top + 1)]
