"""The simple CNN of Fig. 2: 730, 3,700, 6,670, 9,640, 12,610 parameters at depth 1..5 and width 18."""

from torch import Tensor, nn

from dzhpc.errors import InputError


class SimpleCNN(nn.Module):
    """depth x [conv3x3 (bias) - BatchNorm - ReLU - maxpool2], global average pool, linear; [B, C, H, W] -> [B, classes]."""

    def __init__(self, depth: int = 1, width: int = 18, classes: int = 10, in_channels: int = 3):
        super().__init__()
        if depth < 1 or width < 1:
            raise InputError(f"model.depth = {depth}, model.width = {width}: expected at least 1")
        blocks = []
        for k in range(depth):
            conv = nn.Conv2d(width if k else in_channels, width, 3, padding=1)
            blocks += [conv, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*blocks)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))
