"""A data set: images and labels of its two splits, their normalisation, the names of the classes."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dzhpc.errors import InputError


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

    def normalise(self, images: Tensor) -> Tensor:
        """float32 inputs [B, C, H, W] from uint8 pixels; floating-point images pass as float32."""
        if images.dtype != torch.uint8:
            return images.float()
        return (images.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]


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
