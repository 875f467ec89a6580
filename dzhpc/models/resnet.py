"""ResNets for small images (He et al. 2016).

The CIFAR family (resnet20, ...) has 16-32-64 channels and option A shortcuts: subsampling and zero channels, no parameters.
``resnet18`` is the wide family with a 3x3 stem and projection shortcuts. Names follow the layout of
akamaster/pytorch_resnet_cifar10, so its trained weights load.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """conv3x3 - BN - ReLU - conv3x3 - BN, plus the shortcut, ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int, projection: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = (
                nn.Sequential(conv, nn.BatchNorm2d(channels)) if projection else ZeroPadShortcut(stride, channels - in_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ZeroPadShortcut(nn.Module):
    """Option A: every ``stride``-th pixel, the new channels zero on both sides."""

    def __init__(self, stride: int, new_channels: int):
        super().__init__()
        self.stride, self.pad = stride, new_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))


class ResNet(nn.Module):
    """[B, in_channels, H, W] -> [B, classes]; He-initialised."""

    def __init__(self, blocks: list[int], widths: list[int], projection: bool, classes: int, in_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        for k, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = []
            for i in range(count):
                stage.append(BasicBlock(channels, width, 2 if k and not i else 1, projection))
                channels = width
            self.add_module(f"layer{k + 1}", nn.Sequential(*stage))
        self.stages = len(blocks)
        self.linear = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for k in range(self.stages):
            x = getattr(self, f"layer{k + 1}")(x)
        return self.linear(x.mean((2, 3)))


def resnet20(classes: int = 10, in_channels: int = 3) -> ResNet:
    """269,722 parameters."""
    return ResNet([3, 3, 3], [16, 32, 64], False, classes, in_channels)


def resnet56(classes: int = 10, in_channels: int = 3) -> ResNet:
    """853,018 parameters."""
    return ResNet([9, 9, 9], [16, 32, 64], False, classes, in_channels)


def resnet18(classes: int = 10, in_channels: int = 3) -> ResNet:
    """11,173,962 parameters: four stages of 64 to 512 channels, projection shortcuts."""
    return ResNet([2, 2, 2, 2], [64, 128, 256, 512], True, classes, in_channels)
