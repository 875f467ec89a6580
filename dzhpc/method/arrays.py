"""Arrays -> tensors: those that a user's function gave, and those that go to a device."""

import numbers

import numpy as np
import torch
from torch import Tensor


def on_device(given: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """An array, or a tensor of the host, as a tensor there. A GPU that is at work is not waited for, as ``.to`` would do."""
    found = given if isinstance(given, Tensor) else torch.from_numpy(np.ascontiguousarray(given))
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


def to_tensor(given: object) -> Tensor:
    """A contiguous copy of what ``given`` holds, on its device; never a gradient.

    Numbers that torch does not know are taken into wider ones: uint16, uint32 and uint64 into int64 (beyond it
    float64), longdouble into float64.
    Raises ValueError that says what the array is, where it holds no real numbers: complex ones, masked entries, objects.
    """
    if isinstance(given, Tensor):
        if given.is_complex():
            raise ValueError("complex numbers; expected real ones")
        if given.layout != torch.strided:
            raise ValueError("a sparse tensor; expected a dense one")
        if given.is_meta:
            raise ValueError("a tensor on the device meta, which holds no numbers")
        return given.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(given, np.ma.MaskedArray) and np.ma.is_masked(given):
        raise ValueError("a masked array with masked entries; fill them")
    try:
        array = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors with a gradient in a list
        raise ValueError(f"{type(given).__name__}, which is no array ({' '.join(str(error).split())})") from None
    return torch.from_numpy(np.array(array, dtype=_known(array, type(given).__name__), order="C"))


def _known(array: np.ndarray, name: str) -> np.dtype:
    """A dtype of torch that holds the numbers of an array. Raises ValueError."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "c":
        raise ValueError("complex numbers; expected real ones")
    if kind == "O" and array.size and all(isinstance(value, numbers.Real) for value in array.flat):
        return np.dtype(np.float64)
    if kind not in "biuf":
        raise ValueError(f"{name} of {'text' if kind in 'SU' else array.dtype}" if array.ndim else name)
    if kind == "f" and size > 8:
        return np.dtype(np.float64)
    if kind == "u" and size > 1:
        fits = size < 8 or not array.size or array.max() <= np.iinfo(np.int64).max
        return np.dtype(np.int64 if fits else np.float64)
    return array.dtype.newbyteorder("=")
