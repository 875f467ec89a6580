"""Values made comparable to the bit."""

import dataclasses

import numpy as np
import torch


def bits(value):
    """Comparable to the bit: NaN, signed zeros, dtypes and the order of tensors included (HDF5 sorts attributes)."""
    if isinstance(value, torch.Tensor):
        return bits(value.detach().contiguous().numpy())
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        ordered = any(isinstance(v, (torch.Tensor, dict)) for v in value.values())
        return [(k, bits(v)) for k, v in (value.items() if ordered else sorted(value.items()))]
    if dataclasses.is_dataclass(value):
        return [(f.name, bits(getattr(value, f.name))) for f in dataclasses.fields(value)]
    return type(value).__name__, value if not isinstance(value, list) else tuple(value)
