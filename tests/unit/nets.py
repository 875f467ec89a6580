"""Small networks that are hard on an engine, and the slow way to evaluate differences that nothing can go wrong with."""

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import nn

from dzhpc.engines.losses import LOSSES
from dzhpc.models.cnn import SimpleCNN
from dzhpc.models.resnet import resnet20


def by_copies(model, loss, inputs, targets, coords, mu):
    """l(theta + mu e_j) - l(theta), each evaluated on a fresh copy of the model: nothing to reuse, nothing to put back."""

    @torch.no_grad()
    def value(coord):
        twin, first = copy.deepcopy(model), 0
        for p in [p for p in twin.parameters() if p.requires_grad]:
            if coord is not None and first <= coord < first + p.numel():
                flat = p.reshape(-1).clone()
                flat[coord - first] += mu
                p.copy_(flat.view(p.shape))
            first += p.numel()
        with torch.random.fork_rng(devices=[]):
            return LOSSES.get(loss, loss)(twin(inputs.clone()), targets)

    base = value(None)
    return torch.stack([value(int(j)) - base for j in coords]).to(next(model.parameters()).dtype)


def snapshot(model):
    """All that an estimate must leave as it was: parameters, buffers, modes, gradients, random numbers."""
    tensors = [t.detach().clone() for t in [*model.parameters(), *model.buffers()]]
    return tensors, [m.training for m in model.modules()], [p.grad for p in model.parameters()], torch.get_rng_state()


def assert_same(before, after):
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])


def tanh_net(*sizes):
    """A smooth network in float64."""
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


class Quadratic(nn.Module):
    """l(theta) = 1/2 theta' H theta + b' theta, with its exact gradient."""

    def __init__(self, d):
        super().__init__()
        root = torch.randn(d, d, dtype=torch.float64)
        self.h, self.b = root @ root.T, torch.randn(d, dtype=torch.float64)
        self.theta = nn.Parameter(torch.randn(d, dtype=torch.float64))

    def forward(self, x):
        return 0.5 * (self.theta * (x @ self.theta)).sum() + (self.b * self.theta).sum()

    def gradient(self):
        return self.h @ self.theta.detach() + self.b


class Tied(nn.Module):
    """One weight under two names, and one module called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.twice(torch.tanh(self.twice(self.b(torch.tanh(self.a(x))))))


class InPlace(nn.Module):
    """Overwrites features in each way that can be undone, and reads them before and afterwards."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.a(x)
        y = self.b(h)  # reads h before it is overwritten
        h += y
        first = self.c(h)
        z = self.act(h)  # the same tensor as h
        h.mul_(1.5).add_(y, alpha=0.25)
        w = self.c(z)
        early = w * 2
        torch.relu_(w)
        F.leaky_relu(early, 0.3, True)
        early -= F.elu(w, inplace=True)
        return self.d(h) + z * w + early * first


class Unused(nn.Module):
    """A parameter and a whole layer that the output does not depend on."""

    def __init__(self):
        super().__init__()
        self.fc, self.idle, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.ones(2, 3))

    def forward(self, x):
        self.idle(x)
        return self.fc(x)


class Custom(nn.Module):
    """Parameters that are read as attributes, one of them 0-dimensional; a list of them; a weight used outside its module."""

    def __init__(self):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.randn(1, 4))
        self.rows = nn.ParameterList([torch.randn(4) for _ in range(2)])
        self.embed = nn.Linear(4, 4)
        self.register_buffer("scale", torch.linspace(0.5, 2, 4))

    def forward(self, x):
        h = torch.tanh(self.gain * self.embed(x) + self.shift) * self.scale
        for row in self.rows:
            h = h + row * h
        return F.linear(h, self.embed.weight.t()) / (1 + self.gain.abs())


class Recurrent(nn.Module):
    """A leaf with several outputs."""

    def __init__(self):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 4)

    def forward(self, x):
        _, (h, _) = self.lstm(x[:, None, :].repeat(1, 2, 1))
        return self.fc(h[-1])


class RunningMean(nn.Module):
    """A normalisation that keeps its own running mean and count, not by way of torch's BatchNorm."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        h = self.fc(x)
        centre = h.mean(0) if self.training else self.mean
        if self.training:
            self.mean.mul_(0.9).add_(centre.detach(), alpha=0.1)
            self.count.add_(1)
        return self.out(torch.tanh(h - centre))


class Dropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.drop(torch.tanh(self.a(x))))


class Noise(nn.Module):
    """Random numbers that a trace would freeze."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) + torch.randn(4, dtype=x.dtype)


class SetItem(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.a(x)
        h[:, 0] = 0
        return self.b(h)


class View(SetItem):
    """Overwrites a feature through a view of it."""

    def forward(self, x):
        h = self.a(x)
        part = h[:, :2]
        part.mul_(3)
        return self.b(h)


class ControlFlow(SetItem):
    def forward(self, x):
        h = self.a(x)
        return self.b(h) if h.sum() > 0 else self.b(-h)


class AssignsBuffer(SetItem):
    """``+=`` on a buffer assigns the attribute, which a trace cannot repeat."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return self.b(self.a(x)) / self.count


class OwnInput(SetItem):
    """Overwrites its input."""

    def forward(self, x):
        x.mul_(2)
        return self.b(torch.tanh(self.a(x)))


def frozen():
    net = tanh_net(4, 5, 4)
    net[0].weight.requires_grad_(False)
    return net


def channels_last():
    return SimpleCNN(2, 6).to(memory_format=torch.channels_last)


def vectors(dtype=torch.float64):
    return torch.randn(6, 4, dtype=dtype), torch.randn(6, 4, dtype=dtype)


def images(size, batch=4):
    return torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))


# name -> (network, (inputs, targets), loss, how many random coordinates; None: all)
HARD = {
    "cnn depth 1": lambda: (SimpleCNN(1), images(8), "cross_entropy", 40),
    "cnn depth 2": lambda: (SimpleCNN(2), images(8), "cross_entropy", 40),
    "cnn depth 3": lambda: (SimpleCNN(3), images(16), "cross_entropy", 40),
    "cnn eval mode": lambda: (SimpleCNN(2, 6).eval(), images(8), "cross_entropy", 40),
    "resnet20": lambda: (resnet20(), images(16), "cross_entropy", 40),
    "channels last": lambda: (channels_last(), [t.contiguous() for t in images(8)], "cross_entropy", 60),
    "tied": lambda: (Tied().double(), vectors(), "mse", None),
    "in place": lambda: (InPlace().double(), vectors(), "mse", None),
    "in place module": lambda: (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True)).double(),
        vectors(),
        "mse",
        None,
    ),
    "unused": lambda: (Unused().double(), vectors(), "mse", None),
    "custom": lambda: (Custom().double(), vectors(), "mse", None),
    "float32": lambda: (Custom(), vectors(torch.float32), "mse", None),
    "recurrent": lambda: (Recurrent().double(), vectors(), "mse", None),
    "frozen": lambda: (frozen(), vectors(), "mse", None),
    "running mean": lambda: (RunningMean().double(), vectors(), "mse", None),
    "own loss": lambda: (tanh_net(4, 4), vectors(), lambda out, y: (out - y).abs().mean(), None),
    "a layer alone": lambda: (nn.Linear(4, 4).double(), vectors(), "mse", None),
}


def sixteen_bits(dtype):
    """A network of float16 or bfloat16."""
    return nn.Linear(3, 2).to(getattr(torch, dtype))
