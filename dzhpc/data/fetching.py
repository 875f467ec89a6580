"""A data set to be packed: downloaded, or from files that are there."""

import tarfile
import zlib
from pathlib import Path
from urllib.error import URLError

from dzhpc.config.paths import shown
from dzhpc.data import packed
from dzhpc.data.dataset import DataSet
from dzhpc.data.images import cifar10_from, imagefolder_from
from dzhpc.errors import InputError

LARGEST_SIDE = 2**15  # pixels; as data.image_size
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"


def fetch(name: str, root: Path, folder: Path | None = None, size: int | None = None, url: str = URL) -> Path:
    """Write ``root/name.h5``; its path.

    name: "cifar10", or any for an image folder. folder: pack these files; None: download them, which only cifar10 can be.
    size: of an image folder, the pixels of a side after resizing and centre-cropping. url: where CIFAR-10's archive lies.
    Raises InputError where the data cannot be had, read, or written.
    """
    if not name.strip(".") or any(sign in name for sign in "/\0"):
        raise InputError(f"{name!r}: expected a plain name, such as pets; --root chooses the folder")
    path = root / f"{name}.h5"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{shown(root)}: cannot be made ({error.strerror}); choose another with --root") from None
    if name == "cifar10" and size is not None:
        raise InputError("--size: belongs to an image folder; cifar10 has 32 pixels a side")
    if name == "cifar10":
        data_set = _cifar10(root, folder, url)
    elif folder is None:
        raise InputError(f"{name}: only cifar10 can be downloaded; pack an image folder with --from FOLDER --size PIXELS")
    elif size is None or not 1 <= size <= LARGEST_SIDE:
        raise InputError(
            f"--size: needed to pack {shown(folder)}, the pixels of a side after resizing, from 1 to {LARGEST_SIDE:,}"
        )
    else:
        data_set = imagefolder_from(folder, size)
    packed.save(path, data_set)
    return path


def _cifar10(root: Path, folder: Path | None, url: str) -> DataSet:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_and_extract_archive

    if folder is not None:
        parent = folder.parent if folder.name == CIFAR10.base_folder else folder
        return cifar10_from(parent, "give --from the folder that holds cifar-10-batches-py")
    target = root / "cifar10"
    if not (target / CIFAR10.base_folder).is_dir():
        md5 = CIFAR10.tgz_md5 if url == URL else None  # another archive's files are verified one by one below
        try:
            download_and_extract_archive(url, str(target), filename=CIFAR10.filename, md5=md5)
        except (URLError, OSError, RuntimeError, ValueError, EOFError, tarfile.TarError, zlib.error) as error:
            (target / CIFAR10.filename).unlink(missing_ok=True)  # else the next fetch would take it for a good one
            raise InputError(
                f"{url}: cannot be downloaded ({error}); without network, copy the files here and use --from"
            ) from None
    return cifar10_from(target, f"remove {target} and fetch again")
