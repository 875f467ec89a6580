"""How much memory what a chunk makes may take: a rule that knows the kind of device, never what is free on it."""

import torch

LITTLE = 64 * 2**20  # our own library goes coordinate by coordinate: more would save little of Python's time
FILL = 4 * 2**30  # a pass over a quarter of that takes a GPU far longer than a launch


def budget(device: torch.device) -> tuple[int, str]:
    """(bytes, why): 64 MiB on a CPU; on a GPU a quarter of its memory, down to a power of two, and at most 4 GiB."""
    if device.type != "cuda":
        return LITTLE, "on a CPU"
    total = torch.cuda.get_device_properties(device).total_memory
    size = min(FILL, 1 << ((total // 4).bit_length() - 1))
    return size, f"a quarter of the card's {total / 2**30:.1f} GiB, down to a power of two, at most {FILL // 2**30} GiB"
