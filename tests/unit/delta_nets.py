"""Networks of every family that engine delta has rules for, small enough for tests."""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class VGG(nn.Module):
    """Convolutions with bias, stride, groups and dilation; overlapping max pooling; an affine head by `view`."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.conv3, self.fc = nn.Conv2d(8, 6, (3, 2)), nn.Linear(6, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 3, stride=2, padding=1)
        x = F.avg_pool2d(F.leaky_relu(self.conv2(x), 0.1), 2)
        x = F.adaptive_avg_pool2d(torch.tanh(self.conv3(F.pad(x, (1, 1, 1, 1)))), 1)
        return self.fc(x.view(x.size(0), -1))


class Normed(nn.Module):
    """GroupNorm, BatchNorm without running statistics, smooth activations, gates, concatenation and slices."""

    def __init__(self):
        super().__init__()
        self.conv, self.group, self.batch = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.BatchNorm2d(8, affine=False)
        self.gelu, self.tanh_gelu, self.fc = nn.GELU(), nn.GELU(approximate="tanh"), nn.Linear(16, 10)
        self.scale, self.gate = nn.Parameter(torch.rand(8, 1, 1)), nn.Linear(16, 16)

    def forward(self, x):
        x = self.group(self.conv(x))
        y = self.batch(self.gelu(x) * self.scale - 0.5 * self.tanh_gelu(x))
        z = torch.cat([F.silu(y)[:, ::2], x[:, 4:], torch.sigmoid(y[:, :4]), F.hardtanh(x)[:, :4] / (1 + y[:, 4:] ** 2)], 1)
        z = z.mean((2, 3))
        return self.fc(z * torch.softmax(self.gate(z), -1) + (1 - z))


class TinyTransformer(nn.Module):
    """Patches, class token, position embedding, attention by softmax and by the fused function, LayerNorm, GELU."""

    def __init__(self, width=12, heads=2):
        super().__init__()
        self.patch, self.heads = nn.Conv2d(3, width, 8, stride=8), heads
        self.token, self.position = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width) * 0.1)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv1, self.qkv2 = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.out, self.up, self.down, self.fc = (
            nn.Linear(a, b) for a, b in ((width, width), (width, 24), (24, width), (width, 10))
        )

    def split(self, qkv):
        b, t, c = qkv.shape
        return qkv.reshape(b, t, 3, self.heads, c // 3 // self.heads).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        q, k, v = self.split(self.qkv1(self.norm1(x)))
        a = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1) @ v
        x = x + self.out(a.transpose(1, 2).flatten(2))
        q, k, v = self.split(self.qkv2(self.norm2(x)))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.down(F.gelu(self.up(self.norm3(x))))
        return self.fc(x[:, 0])


class DnCNN(nn.Sequential):
    """A denoiser: convolutions with bias, BatchNorm, activations that overwrite."""

    def __init__(self):
        body = [layer for _ in range(2) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))]
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), *body, nn.Conv2d(8, 3, 3, padding=1))


def problem(model, size=16, batch=4):
    """(model, loss, inputs, targets, coordinates of every parameter)."""
    inputs = torch.randn(batch, 3, size, size)
    for p in model.parameters():  # no parameter at a special value
        p.data += 0.05 * torch.randn_like(p)
    offsets = np.cumsum([0] + [p.numel() for p in model.parameters()])
    rng = np.random.default_rng(0)
    coords = np.concatenate([rng.integers(a, b, 4) for a, b in itertools.pairwise(offsets)])
    return inputs, torch.randint(0, 10, (batch,)), coords


def relative(found, expected):
    """Norm of the error, relative to the norm of the truth."""
    return float((found.double() - expected).norm() / expected.norm())
