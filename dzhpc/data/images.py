"""Data sets from the files they are published as: CIFAR-10's batches, folders of images."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dzhpc.config.paths import shown
from dzhpc.data.dataset import DataSet, make_data_set
from dzhpc.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("dzhpc")
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
    """A data set from an image folder: ``train/<class>/`` and ``val/<class>/`` (or ``test/``), read as :func:`_image` says.

    Files of other kinds are left out, and counted in the log. Links are followed, but no folder is read twice.
    Raises InputError for another layout, and for a file that cannot be read, by its name.
    """
    from torchvision import transforms

    test = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or test is None:
        raise InputError(
            f"{shown(folder)}: expected train/<class>/ and val/<class>/ (or test/) with images; check data.root and data.path"
        )
    shape = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    found = [_listed(part) for part in (folder / "train", test)]
    _check_links(*found)
    classes, others = (list(part) for part in found)
    if classes != others:
        raise InputError(f"{shown(folder)}: train/ has the classes {classes}, {test.name}/ has {others}; they must agree")
    splits, widest = [], Widest()
    for part in found:
        images = torch.stack([_image(path, shape, widest) for paths in part.values() for path in paths])
        splits.append((images, np.repeat(np.arange(len(part)), [len(paths) for paths in part.values()])))
    widest.warn(folder)
    return make_data_set(*splits, classes=classes)


class Widest:
    """The largest value in all images of 16 bits: cameras of 10 or 12 bits leave the upper ones unused, and images dark."""

    def __init__(self):
        self.count = self.value = 0

    def warn(self, folder: Path) -> None:
        """Say so where the upper half of the range is empty."""
        if self.count and self.value < 2**15:
            log.warning(
                "%s: %d greyscale images of 16 bits have no value above %d, so they become dark (at most %d of 255); "
                "where they hold fewer bits, scale them first",
                shown(folder), self.count, self.value, round(self.value / 257),
            )  # fmt: skip


def _check_links(train: dict[str, list[Path]], test: dict[str, list[Path]]) -> None:
    """Links may give an image twice. Raises InputError where it comes in two classes; else that is a warning."""
    for part in (train, test):
        first: dict[str, tuple[str, Path]] = {}
        again = 0
        for name, paths in part.items():
            for path in paths:
                of, other = first.setdefault(os.path.realpath(path), (name, path))
                if of != name:
                    raise InputError(f"{_shown(path)}: is the same file as {_shown(other)}, of another class; remove the link")
                again += other is not path
        if again:
            log.warning("%s: %d images are links to others of their class, and count twice", _shown(path.parent.parent), again)
    trained = {os.path.realpath(path) for paths in train.values() for path in paths}
    shared = [path for paths in test.values() for path in paths if os.path.realpath(path) in trained]
    if shared:
        log.warning(
            "%s and %d other test images: are training images, too, so the accuracy is not that on new ones",
            _shown(shared[0]),
            len(shared) - 1,
        )


def _listed(part: Path) -> dict[str, list[Path]]:
    """class -> its images, in the order of their names, folder by folder; what is left out is said."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found, left_out, seen = {}, Counter(), {}
    try:
        for folder in sorted((path for path in part.iterdir() if path.is_dir()), key=lambda path: path.name):
            if _shown(folder.name) != folder.name:
                raise InputError(f"{_shown(folder)}: the name of a class is no text in UTF-8; rename the folder")
            files = [file for _, names in sorted(_walk(folder, seen)) for file in sorted(names)]
            found[folder.name] = [file for file in files if file.suffix.lower() in IMG_EXTENSIONS]
            left_out.update(file.suffix.lower() or file.name for file in files if file.suffix.lower() not in IMG_EXTENSIONS)
            if not found[folder.name]:
                raise InputError(f"{shown(folder)}: holds no image ({', '.join(IMG_EXTENSIONS)}); fill it, or remove it")
    except OSError as error:
        raise InputError(f"{_shown(error.filename or part)}: cannot be read ({error.strerror})") from None
    if not found:
        raise InputError(f"{shown(part)}: holds no folder of a class; expected {part.name}/<class>/ with images")
    log.info("%s: %d images, %d classes", shown(part), sum(map(len, found.values())), len(found))
    if left_out:
        kinds = ", ".join(f"{count} {_shown(kind)}" for kind, count in sorted(left_out.items()))
        log.warning("%s: %d files are left out: %s", shown(part), left_out.total(), kinds)
    return found


def _walk(folder: Path, seen: dict[str, Path]) -> Iterator[tuple[str, list[Path]]]:
    """(folder, its files) for a folder and all below. Raises InputError for one that was ``seen``, by its real path."""
    real = os.path.realpath(folder)
    if real in seen:
        raise InputError(
            f"{_shown(folder)}: is the same folder as {_shown(seen[real])}, so its images would be counted twice; remove the link"
        )
    seen[real] = folder
    entries = sorted(folder.iterdir())
    inner = [path for path in entries if path.is_dir()]
    yield str(folder), [path for path in entries if path not in inner]
    for path in inner:
        yield from _walk(path, seen)


def _image(path: Path, shape: Callable[["Image.Image"], Tensor], widest: Widest) -> Tensor:
    """The pixels of a file after ``shape``, uint8 [3, size, size], turned as its EXIF orientation says.

    Greyscale images become RGB, those of 16 bits are scaled to 8. Raises InputError that names the file.
    """
    from PIL import Image, ImageOps

    if path.exists() and not path.is_file():  # to open a pipe would wait for ever
        raise InputError(f"{_shown(path)}: is no file; remove it")
    try:
        with Image.open(path) as image:
            return shape(_narrow(ImageOps.exif_transpose(image), image.format, widest).convert("RGB"))
    except Exception as error:  # a decoder may raise anything
        said = " ".join(str(error).split()).replace(f" '{path}'", "") or type(error).__name__
        raise InputError(f"{_shown(path)}: cannot be read as an image ({said})") from None


def _narrow(image: "Image.Image", format: str | None, widest: Widest) -> "Image.Image":
    """Pixels of 16 bits scaled to 8. Raises ValueError for wider ones, whose range a file does not tell."""
    from PIL import Image

    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    values = np.asarray(image)
    if not image.mode.startswith("I;16") and format not in ("PNG", "PPM"):  # these have 16 bits at most
        bits = "floating-point" if image.mode == "F" else "32-bit"
        raise ValueError(f"{bits} values from {values.min():g} to {values.max():g}; save 8 or 16 bits, or use a data function")
    widest.count, widest.value = widest.count + 1, max(widest.value, int(values.max()))
    return Image.fromarray((values / 257).round().astype(np.uint8))


def _shown(path: object) -> str:
    """A name for a message, whatever bytes it is made of."""
    return shown(str(path)).encode("utf-8", "backslashreplace").decode()
