"""What a user brings to the runs of cases.py: losses, networks, data, black boxes, solvers. Lies beside the input files."""

import os
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

DIGITS = load_digits()
MEANS = np.stack([DIGITS.images[DIGITS.target == k].mean(0).ravel() for k in range(10)]) * 15 / 255


class Bowl:
    """A quadratic in float64 with a ripple: three coordinates."""

    def initial(self):
        return np.zeros(3)

    def __call__(self, thetas, step):
        return ((thetas - np.array([0.3, -1.2, 2.0])) ** 2 @ np.array([1.0, 2.0, 3.0])) + 0.01 * np.sin(thetas).sum(1)


class Rings:
    """Two named blocks in float32, torch; the loss depends on the step."""

    def initial(self):
        return {"slow": torch.arange(-3, 4) / 3, "fast": (0.5 + torch.arange(10) / 6).reshape(2, 5)}

    def __call__(self, thetas, step):
        scale = torch.arange(1, 18) / 10
        return ((thetas**2 - 1) ** 2 * scale).sum(1) + 0.1 * torch.cos(thetas * (1 + step % 3)).sum(1)


class Breaks(Bowl):
    """24 coordinates; raises in the tenth call of a step where DOWN says which."""

    step, calls = -1, 0

    def initial(self):
        return np.arange(24) / 12 - 1

    def __call__(self, thetas, step):
        self.step, self.calls = step, self.calls + 1 if step == self.step else 0
        if self.calls == 9 and os.environ.get("DOWN") == str(step):
            raise ConnectionError("no license left")
        return ((thetas**2 - 1) ** 2).sum(1) + thetas.sum(1) * (step + 1)


class Norms(nn.Module):
    """8 x 8 pixels: convolutions with BatchNorm and GroupNorm, a residual, LayerNorm and GELU."""

    def __init__(self, classes=10):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.conv, self.groups = nn.Conv2d(4, 4, 3, 1, 1), nn.GroupNorm(2, 4)
        self.layer, self.up, self.out = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.groups(self.conv(x))
        x = torch.nn.functional.avg_pool2d(x, 2).flatten(2).transpose(1, 2)
        return self.out(nn.functional.gelu(self.up(self.layer(x))).mean(1))


class Dropout(nn.Module):
    """A perceptron that draws random numbers in its forward pass."""

    def __init__(self, hidden=4, classes=10):
        super().__init__()
        self.hidden, self.drop, self.out = nn.Linear(64, hidden), nn.Dropout(0.3), nn.Linear(hidden, classes)

    def forward(self, x):
        return self.out(self.drop(torch.tanh(self.hidden(x.flatten(1)))))


class Judge(nn.Module):
    """3 x 8 x 8 pixels -> 3 classes; its weights are numpy's."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(64, classes)
        draw = np.random.default_rng(3)
        for p in self.parameters():
            p.data = torch.from_numpy(draw.normal(0, 0.3, p.shape).astype(np.float32))

    def forward(self, x):
        return self.fc(torch.tanh(self.conv(x)).flatten(1))


def classify(images):
    """The judge as a black box."""
    return Judge()(torch.from_numpy(images)).detach().numpy()


def nearest(images):
    """Distances to the ten digits' means, as logits; breaks once it was asked as often as DOWN says."""
    nearest.calls += 1
    if os.environ.get("DOWN") == str(nearest.calls):
        raise ConnectionError("no license left")
    return -((images.reshape(len(images), 1, -1) - MEANS) ** 2).sum(-1)


nearest.calls = 0


def images():
    """39 and 17 images of three classes."""
    draw = np.random.default_rng(7)
    return [(draw.integers(0, 256, (n, 3, 8, 8), np.uint8), np.arange(n) % 3) for n in (39, 17)]


def ring(states, parameters):
    """A wave that goes round and fades; the corrected solver's coarse step."""
    return 0.9 * states + parameters[:, None, None] * np.roll(states, 1, -1)


def exact(parameter):
    """What ring should have given: eight states [2, 10]."""
    wave = np.random.default_rng(round(100 * parameter)).normal(size=(2, 10))
    return np.stack([0.93**k * np.roll(wave, k, -1) for k in range(8)])


def save_judge(folder: Path):
    """The judge's weights in a file."""
    torch.save(Judge().state_dict(), folder / "judge.th")
