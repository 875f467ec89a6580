"""LocalMixer (Ren et al. 2022): patches as tokens, blocks with heads; 918,770 parameters as M/8/16, 13,074,674 as L/8/64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dzhpc.errors import InputError


@dataclass(frozen=True)
class Stage:
    """A layer of a block: a product and its normalisation, then ReLU; the last one adds the block's input before it.

    normalised: [B, P, .] -> the normalised pre-activation [B, P, C].
    """

    normalised: Callable[[Tensor], Tensor]
    mixes_patches: bool = False
    adds_input: bool = False

    def activation(self, z: Tensor, x: Tensor) -> Tensor:
        """Of z [B, P, C], x being the block's input."""
        return F.relu(z + x if self.adds_input else z)


class Block(nn.Module):
    """[B, P, inputs] -> [B, P, width]: a product over patches (not in the first block), one over channels, one within groups.

    Normalised without affine map: over the channels of a patch, behind the last product over those of a group.
    """

    def __init__(self, inputs: int, width: int, groups: int, patches: int, first: bool):
        super().__init__()
        self.width, self.groups, self.first = width, groups, first
        self.token = None if first else nn.Linear(patches, patches)
        self.channel = nn.Linear(inputs, width)
        size = width // groups
        self.weight, self.bias = nn.Parameter(torch.empty(groups, size, size)), nn.Parameter(torch.zeros(width))
        for layer in (self.channel, *([self.token] if self.token is not None else [])):
            init(layer)
        draw(self.weight, size)

    def stages(self) -> list[Stage]:
        """In their order."""
        token = [] if self.first else [Stage(self._tokens, mixes_patches=True)]
        return [*token, Stage(self._channels), Stage(self._groups, adds_input=not self.first)]

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for stage in self.stages():
            h = stage.activation(stage.normalised(h), x)
        return h

    def _tokens(self, h: Tensor) -> Tensor:
        return F.layer_norm(self.token(h.transpose(1, 2)).transpose(1, 2), (self.width,))

    def _channels(self, h: Tensor) -> Tensor:
        return F.layer_norm(self.channel(h), (self.width,))

    def _groups(self, h: Tensor) -> Tensor:
        parts = h.unflatten(-1, (self.groups, -1))
        out = torch.einsum("bpgi,goi->bpgo", parts, self.weight) + self.bias.view(self.groups, -1)
        return F.layer_norm(out, (self.width // self.groups,)).flatten(-2)


class LocalMixer(nn.Module):
    """[B, in_channels, image_size, image_size] -> [B, classes]: the last head, on the mean over patches.

    grid: patches along a side, so that P = grid^2. width: C channels, in so many groups. The blocks' heads take part in training
    by local losses alone.
    """

    def __init__(
        self,
        depth: int = 4,
        width: int = 512,
        groups: int = 16,
        grid: int = 8,
        image_size: int = 32,
        classes: int = 10,
        in_channels: int = 3,
    ):
        super().__init__()
        if depth < 1 or width < 2 * groups or width % groups or image_size % grid:
            raise InputError(
                f"model.width = {width} must be a multiple of groups = {groups}, at least twice it, and "
                f"image_size = {image_size} of grid = {grid}; depth = {depth} at least 1"
            )
        self.grid, numbers = grid, in_channels * (image_size // grid) ** 2
        self.blocks = nn.ModuleList([Block(width if k else numbers, width, groups, grid**2, k == 0) for k in range(depth)])
        self.heads = nn.ModuleList([init(nn.Linear(width, classes)) for _ in range(depth)])
        self.final = nn.Linear(width, classes)
        nn.init.zeros_(self.final.weight)
        nn.init.zeros_(self.final.bias)

    def patches(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, P, numbers of a patch]."""
        x = x.unflatten(3, (self.grid, -1)).unflatten(2, (self.grid, -1))
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        for block in self.blocks:
            x = block(x)
        return self.final(x.mean(1))


def draw(weight: Tensor, fan_in: int) -> None:
    """N(0, s^2), s = 2 / sqrt(fan-in), at most 0.1."""
    nn.init.normal_(weight, std=min(2 / fan_in**0.5, 0.1))


def init(layer: nn.Linear) -> nn.Linear:
    """Weights drawn, biases 0."""
    draw(layer.weight, layer.in_features)
    nn.init.zeros_(layer.bias)
    return layer
