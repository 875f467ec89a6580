"""A torch state_dict that others wrote: what kind of file it is, where in it the weights lie, and under which names."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dzhpc.config.paths import at_once

log = logging.getLogger("dzhpc")
PLACES = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")  # before any other
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch.compile, FSDP: anywhere in a name
DEPTH = 3  # dictionaries in dictionaries
COUNTER = "num_batches_tracked"  # BatchNorm's, which older files lack


def read(path: str) -> object:
    """What ``torch.load`` finds, tensors and plain containers only. Raises OSError; ValueError that says what the file is."""
    with open(path, "rb", opener=at_once) as file:
        head = file.read(512)
    if kind := _foreign(head):
        raise ValueError(kind)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of files that are not its own
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise what they like
        text = " ".join(str(error).split())
        if "TorchScript" in text:
            raise ValueError("is a TorchScript archive; save the network's state_dict() instead") from None
        if found := re.search(r"GLOBAL (\S+)", text):
            raise ValueError(f"holds Python objects ({found[1]}), not only tensors; save model.state_dict() instead") from None
        text = error.strerror or text if isinstance(error, OSError) else text
        reason = type(error).__name__ if "weights_only" in text or not text else text.split(". ")[0][:200]
        raise ValueError(f"is no file of torch.save, or is cut short ({reason})") from None


def _foreign(head: bytes) -> str:
    """What a file that begins so is, where that is no file of torch's."""
    start = head.lstrip().lower()
    if not head:
        return "is empty"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page; download the weights themselves"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of git-lfs; get the file itself with `git lfs pull`"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "is a safetensors file; write torch.save(safetensors.torch.load_file(FILE), OTHER) and name OTHER"
    if head.startswith(b"\x93NUMPY") or (head.startswith(b"PK") and b".npy" in head):
        return "is a file of NumPy's; write torch.save({name: torch.from_numpy(array), ...}, OTHER) and name OTHER"
    if start.startswith(b"\x89hdf"):
        return "is an HDF5 file that dzhpc did not write"
    return ""


def fitted(content: object, model: nn.Module) -> dict[str, Tensor]:
    """The weights in ``content`` by the model's names. Where they lie deeper, or have longer names, the log says so.

    Raises ValueError that says what the file holds and what the model wants.
    """
    own = model.state_dict()
    found = list(_places(content))
    for place, tensors in found:
        for prefix, part in _renamed(tensors, own):
            if not _misfits(part, own):
                if place or prefix:
                    log.info("weights: taken from %s", " ".join([*([f"[{place!r}]"] if place else []), f"{prefix}*"]))
                return part
    raise ValueError(_difference(found, own, type(model).__name__))


def _places(content: object, place: str = "", depth: int = DEPTH) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(where, tensors by name) of all dictionaries that hold tensors; the usual places first."""
    if not isinstance(content, Mapping):
        return
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield place, tensors
    inner = [k for k in content if isinstance(k, str) and depth]
    for key in [*(k for k in PLACES if k in inner), *(k for k in inner if k not in PLACES)]:
        yield from _places(content[key], f"{place}/{key}" if place else key, depth - 1)


def _renamed(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(prefix, tensors below it by the rest of their names), for each prefix that makes the model's first name of some name."""
    first = next(iter(own), "")
    plain = {re.sub("|".join(map(re.escape, WRAPPERS)), "", name): value for name, value in tensors.items()}
    for names in [tensors, *([plain] if plain.keys() != tensors.keys() else [])]:
        yield "", names
        for name in names:
            if first and name.endswith(f".{first}"):
                prefix = name[: -len(first)]
                yield prefix, {k.removeprefix(prefix): v for k, v in names.items() if k.startswith(prefix)}


def _misfits(part: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """What keeps weights from being the model's."""
    missing = [k for k in own if k not in part and not k.endswith(COUNTER)]
    unknown = [k for k in part if k not in own]
    shapes = [k for k in own if k in part and own[k].shape != part[k].shape]
    odd = [(k, kind) for k in own if k in part and (kind := _unlike(part[k], own[k]))]
    said = [f"the file has no {missing[0]} ({len(missing)} in all)"] if missing else []
    said += [f"the model has no {unknown[0]} ({len(unknown)} in all)"] if unknown else []
    return (
        said
        + [f"{k} is {list(part[k].shape)}, in the model {list(own[k].shape)}" for k in shapes[:1]]
        + [f"{k} is {kind}; save plain real numbers" for k, kind in odd[:1]]
    )


def _unlike(given: Tensor, own: Tensor) -> str:
    """In what a tensor cannot be copied into the model's without loss; "" where it can."""
    if given.is_complex() and not own.is_complex():
        return "complex"
    if given.is_meta:
        return "on the device meta, without numbers"
    return "quantised" if given.is_quantized else "sparse" if given.layout != own.layout else ""


def _difference(found: list[tuple[str, dict[str, Tensor]]], own: Mapping[str, Tensor], name: str) -> str:
    """Of the dictionary, and the prefix, that has most names in common with the model."""
    options = [(place, prefix, part) for place, tensors in found for prefix, part in _renamed(tensors, own)]
    if not options:
        return f"does not fit {name}: holds no tensors by name"
    place, prefix, part = max(options, key=lambda option: len(option[2].keys() & own.keys()))
    where = f" below {place}" if place else ""
    names = ", ".join(f"{prefix}{k}" for k in list(part)[:2])
    return (
        f"does not fit {name}: holds {len(part)} tensors{where} ({names}, ...), the model wants {len(own)} "
        f"({', '.join(list(own)[:2])}, ...); {'; '.join(_misfits(part, own))}"
    )
