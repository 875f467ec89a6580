"""A trained network to be asked many times: BatchNorm folded into the convolutions, channels-last, batches that stay in cache."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

BATCH = 32  # images in one pass: the features of a small ResNet then stay in a core's cache
BATCH_CUDA = 4096
ROUNDING = 1e-3  # of the answers: what folding may change


class Frozen(nn.Module):
    """Images [N, C, H, W] in [0, 1] -> what ``model`` gives for (images - mean) / std, in eval mode; mean, std [C].

    The numbers are the model's up to rounding. No parameter has a gradient; the images may. shape: of an image.
    The model is taken over: it stays in eval mode, its parameters without gradient.
    """

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor, shape: Sequence[int]):
        super().__init__()
        sample = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
        found = _folded(model.eval().requires_grad_(False), (sample - mean[:, None, None]) / std[:, None, None])
        self.model = found.to(memory_format=torch.channels_last).requires_grad_(False).eval()
        self.register_buffer("mean", mean.clone()[:, None, None])
        self.register_buffer("std", std.clone()[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        size = BATCH_CUDA if images.is_cuda else BATCH
        return torch.cat([self._one(part) for part in images.split(size)])

    def _one(self, images: Tensor) -> Tensor:
        normalised = (images - self.mean) / self.std
        return self.model(normalised.contiguous(memory_format=torch.channels_last))


def _folded(model: nn.Module, inputs: Tensor) -> nn.Module:
    """A copy without BatchNorm where torch.fx can trace the model, and the copy gives the same answers; else the model itself.

    Torch folds once for each call: it is wrong about a layer that is called twice, one with hooks, and weights made by hooks.
    """
    from torch.fx.experimental.optimization import fuse

    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
            warnings.simplefilter("ignore")
            expected = model(inputs)
            folded = fuse(model)
            return folded if float((folded(inputs) - expected).norm()) <= ROUNDING * float(expected.norm()) else model
    except Exception:  # a user's forward may do what no trace can follow: then it is as slow as it was
        return model
