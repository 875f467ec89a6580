"""Our own kernels on a GPU, as providers; Triton is imported where one is made."""

import importlib.util

import torch
from torch import Tensor, nn

LARGEST = 2**31  # elements of a base value: places in it are 32 bits wide


class TritonPasses:
    """See :class:`dzhpc.engines.kernels.find.Pass`; BatchNorm2d in train mode, on GPUs that multiply bfloat16."""

    name = "triton"

    def __init__(self):
        try:
            from dzhpc.engines.kernels import triton_passes
        except ImportError as error:
            raise OSError(str(error)) from None
        self.sums, self.carry = triton_passes.sums, triton_passes.carry

    @staticmethod
    def types(device: torch.device) -> list[torch.dtype]:
        """What it may serve on this machine."""
        if device.type != "cuda" or importlib.util.find_spec("triton") is None:
            return []
        return [torch.float32, torch.bfloat16] if torch.cuda.get_device_capability(device) >= (8, 0) else []

    @classmethod
    def fits(cls, norm: nn.Module, like: Tensor) -> bool:
        """Changes of images, in float32 or bfloat16."""
        images = isinstance(norm, nn.BatchNorm2d) and like.ndim == 5 and like[0].numel() < LARGEST
        return images and like.dtype in cls.types(like.device)
