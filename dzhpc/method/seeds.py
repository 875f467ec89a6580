"""Random numbers as functions of (seed, purpose, indices): never of a process's hidden state."""

import hashlib

import torch


def derive(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed that depends on every argument; nearby arguments give unrelated values."""
    text = ":".join(map(str, (seed, purpose, *indices)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU generator seeded by :func:`derive`: the same numbers whatever device uses them."""
    return torch.Generator().manual_seed(derive(seed, purpose, *indices))
