"""A trained network to be asked many times: BatchNorm folded into the convolutions, channels-last, batches that stay in cache."""

import copy
import warnings

import torch
from torch import Tensor, nn

BATCH = 32  # images in one pass: the features of a small ResNet then stay in a core's cache
BATCH_CUDA = 4096


class Frozen(nn.Module):
    """Images [N, C, H, W] in [0, 1] -> what ``model`` gives for (images - mean) / std, in eval mode; mean, std [C].

    The numbers are the model's up to rounding. No parameter has a gradient; the images may.
    """

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor):
        super().__init__()
        self.model = _folded(model).to(memory_format=torch.channels_last).requires_grad_(False).eval()
        self.register_buffer("mean", mean.clone()[:, None, None])
        self.register_buffer("std", std.clone()[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        size = BATCH_CUDA if images.is_cuda else BATCH
        return torch.cat([self._one(part) for part in images.split(size)])

    def _one(self, images: Tensor) -> Tensor:
        normalised = (images - self.mean) / self.std
        return self.model(normalised.contiguous(memory_format=torch.channels_last))


def _folded(model: nn.Module) -> nn.Module:
    """A copy without BatchNorm where torch.fx can trace the model, else a plain copy."""
    from torch.fx.experimental.optimization import fuse

    model = copy.deepcopy(model).eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fuse(model)
    except Exception:  # a user's forward may do what no trace can follow: then it is as slow as it was
        return model
