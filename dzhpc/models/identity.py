"""The identity of an architecture, and of its weights."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

SAMPLED = 1024  # of a data set may be many GiB, a start is to take no longer for it


def tensors_sha256(tensors: Mapping[str, Tensor], content: bool = False) -> str:
    """SHA-256 over names, shapes and dtypes, and over the bytes if ``content``."""
    digest = hashlib.sha256()
    for name, t in tensors.items():
        digest.update(f"{name}:{tuple(t.shape)}:{t.dtype};".encode())
        if content:
            flat = t.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """16 digits that tell one data set from another, by at most SAMPLED entries of each tensor, evenly spaced."""
    some = {}
    for name, t in tensors.items():
        places = (torch.arange(min(SAMPLED, len(t))) * len(t) // max(1, min(SAMPLED, len(t)))).to(t.device)
        some[f"{name} of {len(t)}"] = t[places]
    return tensors_sha256(some, content=True)[:16]


def model_sha256(model: nn.Module) -> str:
    """The identity of an architecture: names, shapes and dtypes of parameters and buffers."""
    return tensors_sha256({**dict(model.named_parameters()), **dict(model.named_buffers())})
