"""The 8-layer CNN of Table 1 (Boopathy and Fiete 2022): 56,714, 224,010, 14,178,314 parameters at width 32, 64, 512."""

import torch
from torch import Tensor, nn

from dzhpc.errors import InputError

STRIDES = (1, 1, 1, 2, 1, 2, 1)
EPS = 1e-6  # of the variance of a product that is divided by its fan-in


class CNN8(nn.Module):
    """7 x [conv3x3 (bias) - normalisation - ReLU], global average pool, linear; [B, C, H, W] -> [B, classes].

    The normalisation is over the batch alone, for each pixel and channel, without affine map or running statistics: in eval
    mode, too, each batch is normalised by its own, so that a batch needs at least two images. Weights are N(0, 1), and products
    divided by the root of the fan-in: for convolutions that is in the eps of the normalisation behind them. Their biases are
    without effect. image_size: pixels of a side, which say how many numbers are normalised.
    """

    def __init__(self, width: int = 64, image_size: int = 32, classes: int = 10, in_channels: int = 3):
        super().__init__()
        if width < 1 or image_size < 1:
            raise InputError(f"model.width = {width}, model.image_size = {image_size}: expected at least 1")
        layers, channels, size = [], in_channels, image_size
        for stride in STRIDES:
            size = -(-size // stride)
            norm = nn.BatchNorm1d(width * size * size, eps=9 * channels * EPS, affine=False, track_running_stats=False)
            conv = nn.Conv2d(channels, width, 3, stride, 1)
            layers += [conv, nn.Flatten(), norm, nn.Unflatten(1, (width, size, size)), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(width, classes)
        self.root = width**0.5
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)) / self.root)


class LeNet(nn.Module):
    """LeNet-5 (62,006 parameters on CIFAR-10), the network of pattern search (Chiang et al. 2023); [B, C, H, W] -> [B, classes].

    uniform: all parameters start uniform in [-1, 1]. scale_free: logits are divided by the product of |W| / 3 over the layers, so
    that the loss cannot be lowered by growing weights. image_size: pixels of a side.
    """

    def __init__(
        self, uniform: bool = False, scale_free: bool = False, image_size: int = 32, classes: int = 10, in_channels: int = 3
    ):
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise InputError(f"model.image_size = {image_size}: lenet needs at least 16")
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * side * side, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)
        )
        self.scale_free = scale_free
        if uniform:
            for p in self.parameters():
                nn.init.uniform_(p, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.classifier(self.features(x).flatten(1))
        if not self.scale_free:
            return logits
        weights = [m.weight for m in [*self.features, *self.classifier] if hasattr(m, "weight")]
        return logits / torch.stack([w.square().sum().sqrt() / 3 for w in weights]).prod()
