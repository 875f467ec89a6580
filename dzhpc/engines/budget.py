"""What a chunk may take of memory, and how many coordinates it may have: rules that know the device, never what is free on it."""

import torch

LITTLE = 64 * 2**20  # our own library goes coordinate by coordinate: more would save little of Python's time
FILL = 4 * 2**30  # a pass over a quarter of that takes a GPU far longer than a launch
FEW, MANY = 64, 512  # coordinates: more would save a CPU little; where changes are small, launches would outlast a GPU's passes


def budget(device: torch.device) -> tuple[int, str]:
    """(bytes, why): 64 MiB on a CPU; on a GPU a quarter of its memory, down to a power of two, and at most 4 GiB."""
    if device.type != "cuda":
        return LITTLE, "on a CPU"
    total = torch.cuda.get_device_properties(device).total_memory
    size = min(FILL, 1 << ((total // 4).bit_length() - 1))
    return size, f"a quarter of the card's {total / 2**30:.1f} GiB, down to a power of two, at most {FILL // 2**30} GiB"


def most(device: torch.device) -> int:
    """Coordinates in a chunk at most: 64 on a CPU, 512 on a GPU."""
    return MANY if device.type == "cuda" else FEW
