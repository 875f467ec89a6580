"""DnCNN (Zhang et al. 2017): a denoiser that predicts the noise. Names follow KAIR's layout, so its trained weights load."""

from torch import Tensor, nn


class DnCNN(nn.Module):
    """Images [B, channels, H, W] -> images, x - model(x); ``model`` is ``depth`` 3x3 convolutions with ReLU between them.

    batch_norm: BatchNorm behind each convolution but the first and the last, as in the paper; KAIR's published weights have none.
    """

    def __init__(self, depth: int = 20, width: int = 64, channels: int = 3, batch_norm: bool = False):
        super().__init__()
        if depth < 2:
            raise ValueError(f"depth = {depth}: expected at least 2 convolutions")
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers.append(nn.Conv2d(width, width, 3, padding=1, bias=not batch_norm))
            layers += [nn.BatchNorm2d(width)] if batch_norm else []
            layers.append(nn.ReLU())
        layers.append(nn.Conv2d(width, channels, 3, padding=1))
        self.model = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(layers[-1].weight)  # begins as the identity: the best guess before any training

    def forward(self, x: Tensor) -> Tensor:
        return x - self.model(x)
