"""Verb: bring a data set to where compute nodes can read it, as one packed HDF5 file.

``python -m dzhpc.fetch cifar10 --root data`` downloads; ``--from FOLDER`` packs what is already there. Run it on a node with
network access, before the job: nothing is downloaded inside a run. One file instead of 60,000 spares a parallel file system.
"""

import argparse
import tarfile
import zlib
from pathlib import Path
from urllib.error import URLError

from dzhpc import data
from dzhpc.errors import InputError
from dzhpc.files import store
from dzhpc.job.launch import run_verb
from dzhpc.job.world import World

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("dzhpc.fetch", description="Download or pack a data set into ROOT/NAME.h5.")
    p.add_argument("name", help="cifar10, or any name for an image folder given by --from")
    p.add_argument("--root", type=Path, default=Path("data"), help="where data sets lie (default: data)")
    p.add_argument(
        "--from",
        dest="folder",
        type=Path,
        help="pack this folder: cifar-10-batches-py or its parent, or train/ and val/ with images",
    )
    p.add_argument("--size", type=int, help="image folder: pixels of a side after resizing and centre-cropping")
    p.add_argument("--url", default=URL, help="cifar10: another place of cifar-10-python.tar.gz")
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb; the exit code."""
    path = world.on_root(lambda: fetch(args))
    if world.is_root:
        print(f"written: {path}")
    return 0


def fetch(args: argparse.Namespace) -> Path:
    """The packed file's path. Raises InputError where the data cannot be had, read, or written."""
    path = args.root / f"{args.name}.h5"
    try:
        args.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{args.root}: cannot be made ({error.strerror})") from None
    if args.name == "cifar10":
        data_set = _cifar10(args)
    elif args.folder is None:
        raise InputError(f"{args.name}: only cifar10 can be downloaded; pack an image folder with --from FOLDER --size PIXELS")
    elif args.size is None or args.size < 1:
        raise InputError(f"--size: needed to pack {args.folder}, the pixels of a side after resizing")
    else:
        data_set = data.imagefolder_from(args.folder, args.size)
    splits = {
        name: (part.images.permute(0, 2, 3, 1).numpy(), part.labels.numpy())
        for name, part in (("train", data_set.train), ("test", data_set.test))
    }
    store.save_packed(path, splits, data_set.mean, data_set.std, data_set.classes)
    return path


def _cifar10(args: argparse.Namespace) -> data.DataSet:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_and_extract_archive

    if args.folder is not None:
        parent = args.folder.parent if args.folder.name == CIFAR10.base_folder else args.folder
        return data.cifar10_from(parent, "give --from the folder that holds cifar-10-batches-py")
    folder = args.root / "cifar10"
    if not (folder / CIFAR10.base_folder).is_dir():
        md5 = CIFAR10.tgz_md5 if args.url == URL else None  # another archive's files are verified one by one below
        try:
            download_and_extract_archive(args.url, str(folder), filename=CIFAR10.filename, md5=md5)
        except (URLError, OSError, RuntimeError, EOFError, tarfile.TarError, zlib.error) as error:
            (folder / CIFAR10.filename).unlink(missing_ok=True)  # else the next fetch would take it for a good one
            raise InputError(
                f"{args.url}: cannot be downloaded ({error}); without network, copy the files here and use --from"
            ) from None
    return data.cifar10_from(folder, f"remove {folder} and fetch again")


if __name__ == "__main__":
    run_verb(parser(), main, parallel=False)
