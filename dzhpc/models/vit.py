"""Vision transformers for small images (Dosovitskiy et al. 2021; the "tiny" sizes of Touvron et al. 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dzhpc.errors import InputError


class Block(nn.Module):
    """LayerNorm - attention, plus the input; LayerNorm - linear - GELU - linear, plus the input. [B, T, width] -> the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """[B, in_channels, image_size, image_size] -> [B, classes]: patches, class token, position embedding, ``depth`` blocks."""

    def __init__(
        self,
        depth: int = 12,
        width: int = 192,
        heads: int = 3,
        patch: int = 4,
        image_size: int = 32,
        classes: int = 10,
        in_channels: int = 3,
    ):
        super().__init__()
        if width % heads or image_size % patch:
            raise InputError(f"model.width = {width} must be a multiple of heads = {heads}, image_size of patch = {patch}")
        self.patches = nn.Conv2d(in_channels, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, (image_size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)
        for p in [self.token, self.position, *[m.weight for m in self.modules() if isinstance(m, nn.Linear)]]:
            nn.init.trunc_normal_(p, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])
