"""Tensors in HDF5 files, bit for bit, whatever their dtype."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin

from dzhpc.errors import InputError
from dzhpc.files.h5 import Dataset, Group

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by the size of an element


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError for the first one that :func:`put_tensors` cannot write."""
    for name, t in tensors.items():
        if not all(part.strip(".") for part in name.split("/")) or any(other.startswith(f"{name}/") for other in tensors):
            raise InputError(f"the model's {name!r}: HDF5 takes the slashes of this name for folders; rename it")
        if t.layout is not torch.strided or t.is_quantized or isinstance(t, UninitializedTensorMixin):
            kind = "not yet initialised" if isinstance(t, UninitializedTensorMixin) else f"of layout {t.layout}, dtype {t.dtype}"
            raise InputError(
                f"the model's {name} is {kind}: a checkpoint holds dense tensors; make it one, or register it as none"
            )


def array(t: Tensor) -> np.ndarray:
    """The content of a tensor; of a dtype that NumPy lacks (bfloat16) as integers, bit for bit."""
    t = t.detach().cpu().contiguous()
    try:
        return t.numpy()
    except TypeError:
        return t.view(BITS[t.element_size()]).numpy()


def put_tensors(group: Group, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name, in their order; an attribute says the dtype where NumPy lacks it."""
    for name, t in tensors.items():
        found = array(t)
        item = group.create_dataset(name, data=found)
        if str(found.dtype) != (dtype := str(t.dtype).removeprefix("torch.")):
            item.attrs["torch"] = dtype
    group.attrs["order"] = list(tensors)


def get_tensors(group: Group) -> dict[str, Tensor]:
    """The tensors of :func:`put_tensors`, on the CPU."""
    return {str(name): _tensor(group[str(name)]) for name in group.attrs["order"]}


def _tensor(item: Dataset) -> Tensor:
    t = torch.from_numpy(np.asarray(item[()]))
    return t.view(getattr(torch, str(item.attrs["torch"]))) if "torch" in item.attrs else t
