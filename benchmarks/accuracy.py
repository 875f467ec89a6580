"""How close the engines' differences are to the float64 finite difference: the correctness table of engine ``delta``.

    python benchmarks/accuracy.py --weights FOLDER --out benchmarks/results/delta-accuracy.md

Each network is evaluated on coordinates of every parameter. Some have a difference that is zero but for rounding (a bias before a
BatchNorm): their error is given in absolute numbers, beside the typical size of the others.
"""

import argparse
import copy
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dzhpc
from dzhpc import config, data
from dzhpc.engines.protocol import WhiteBox
from dzhpc.errors import InputError
from dzhpc.job import device as devices
from dzhpc.job import processor
from dzhpc.models.cnn import SimpleCNN
from dzhpc.models.resnet import resnet18, resnet20
from dzhpc.models.vit import ViT
from dzhpc.models.weights import load_weights

MUS = (5e-3, 1e-4)
ENGINES = (("delta", "fp32"), ("delta", "bf16"), ("reuse", "fp32"))
TARGETS = {("delta", "fp32"): 1e-3, ("delta", "bf16"): 2e-2}
ZERO = 1e-9  # of the largest difference: what float64 leaves of a zero


class VGG(nn.Sequential):
    """Convolutions with bias and max pooling, no normalisation."""

    def __init__(self):
        layers, channels = [], 3
        for width in (16, 32, 64):
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, 10))


class Grouped(nn.Module):
    """Residual blocks of convolution - GroupNorm - SiLU."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, 10)
        block = lambda: nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))  # noqa: E731
        self.blocks = nn.ModuleList([block() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for k, block in enumerate(self.blocks):
            x = x + block(x)
            x = F.avg_pool2d(x, 2) if k % 2 else x
        return self.fc(x.mean((2, 3)))


class DnCNN(nn.Module):
    """20 convolutions with bias, ReLU between; gives the image without the noise that it finds."""

    def __init__(self, depth: int = 20, width: int = 64):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.model(x)


@dataclass
class Case:
    """A network with what it is to be evaluated on."""

    name: str
    make: Callable[[], nn.Module]
    batch: int
    weights: str = ""  # a file of trained weights
    loss: str = "cross_entropy"


CASES = [
    *[Case(f"CNN depth {depth}", lambda depth=depth: SimpleCNN(depth), 32) for depth in range(1, 6)],
    Case("ResNet-20", resnet20, 8),
    Case("ResNet-20, trained", resnet20, 8, "cifar10-resnet20.th"),
    Case("ResNet-18", resnet18, 2),
    Case("DnCNN, MSE", DnCNN, 1, loss="mse"),
    Case("DnCNN, MSE, trained", DnCNN, 1, "dncnn-color-blind.pth", "mse"),
    Case("ViT, depth 4, width 64", lambda: ViT(depth=4, width=64, heads=4), 8),
    Case("VGG-like", VGG, 16),
    Case("GroupNorm net", Grouped, 8),
]


def images(count: int) -> tuple[Tensor, Tensor, str]:
    """Normalised images of CIFAR-10 with their labels, or random ones where there is no CIFAR-10, and which of the two."""
    try:
        found = data.load(config.Data(name="cifar10"), 0)
    except InputError:
        return torch.randn(count, 3, 32, 32), torch.randint(0, 10, (count,)), "random images"
    return found.normalise(found.train.images[:count]), found.train.labels[:count], "CIFAR-10"


def batch(case: Case, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets in float32; a denoiser gets noise of 25/255 on top of pixels in [0, 1]."""
    inputs, labels = inputs[: case.batch], labels[: case.batch]
    if case.loss == "cross_entropy":
        return inputs, labels
    clean = (inputs - inputs.amin()) / (inputs.amax() - inputs.amin())
    return clean + 25 / 255 * torch.randn_like(clean), clean


def coordinates(engine: WhiteBox, count: int) -> np.ndarray:
    """At least ``count`` coordinates (all, if there are fewer), equally many of each parameter, without repetition."""
    draw, sizes = np.random.default_rng(0), [p.numel() for p in engine.index.parameters]
    share = -(-count // len(sizes))
    while sum(min(n, share) for n in sizes) < min(count, sum(sizes)):
        share += 1
    first, chosen = np.cumsum([0, *sizes[:-1]]), []
    for start, n in zip(first, sizes, strict=True):
        chosen.append(start + draw.choice(n, min(n, share), replace=False))
    return np.concatenate(chosen)


def row(case: Case, args: argparse.Namespace, inputs: Tensor, labels: Tensor) -> list[str]:
    """Lines of the table for one network."""
    torch.manual_seed(0)
    model = case.make()
    if case.weights:
        load_weights(model, str(args.weights / case.weights))
    inputs, targets = batch(case, inputs, labels)
    model, inputs = (x.to(args.device, memory_format=torch.channels_last) for x in (model, inputs))
    targets = targets.to(args.device)
    exact_targets = targets.double() if targets.is_floating_point() else targets
    wide, exact_targets = copy.deepcopy(model).double(), targets.double() if targets.is_floating_point() else targets
    truth = bound("reuse", "fp32", wide, case.loss, inputs.double(), exact_targets)
    full = bound("full", "fp32", wide, case.loss, inputs.double(), exact_targets)
    coords = coordinates(truth, args.coords)
    start, few = time.perf_counter(), coords[:: max(1, len(coords) // 5)]
    engines = [bound(kind, precision, copy.deepcopy(model), case.loss, inputs, targets) for kind, precision in ENGINES]
    lines = []
    for mu in MUS:
        expected = truth.differences(coords, mu)
        if not torch.equal(full.differences(few, mu), truth.differences(few, mu)):
            raise SystemExit(f"{case.name}: engines full and reuse differ in float64")
        zero = expected.abs() < ZERO * expected.abs().max()
        cells = [case.name, str(case.batch), str(len(coords)), f"{mu:g}"]
        largest = []
        for engine, key in zip(engines, ENGINES, strict=True):
            error = engine.differences(coords, mu).double() - expected
            relative = float(error[~zero].norm() / expected[~zero].norm())
            cells.append(f"{relative:.1e}" + (" **missed**" if relative > TARGETS.get(key, np.inf) else ""))
            largest.append(f"{float(error[zero].abs().max()):.0e}" if zero.any() else "")
        cells.append(f"{float(expected[~zero].abs().median()):.0e}")
        cells.append(f"{int(zero.sum())}: {', '.join(largest)}" if zero.any() else "none")
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], f"({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
    return lines


def bound(kind: str, precision: str, model: nn.Module, loss: str, inputs: Tensor, targets: Tensor) -> WhiteBox:
    """An engine with its batch."""
    engine = dzhpc.make_engine(kind, model, loss, precision, emulate_bf16=True)
    engine.bind(inputs, targets)
    return engine


HEAD = """# Accuracy of the engines' differences

`{command}`

{machine}, {threads} thread(s). Python {python}, torch {torch}. {images}; weights random but where it says trained; train mode.

Relative norm of the error over the coordinates of the row, equally many of every parameter, against the float64 difference with
the same weights and batch (by engine `reuse`, checked to be `full`'s to the bit on some of the coordinates of each row). Targets
for `delta`: 1e-3 in fp32, 2e-2 in bf16. Last columns: the median size of a difference; how many coordinates have a difference
that is zero but for rounding (a bias before a BatchNorm; below {zero:g} of the largest), and the largest error there, absolute,
for the three engines in the same order.

| network | batch | coordinates | mu | delta fp32 | delta bf16 | reuse fp32 | typical difference | true zeros: largest error |
|---|---|---|---|---|---|---|---|---|
"""


def machine() -> str:
    """The processor's name and its number of cores."""
    try:
        name = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    have = [word for word in ("avx512_f", "avx512_bf16", "amx_bf16") if word in processor.capabilities()]
    return f"{os.cpu_count()} cores of {name} ({', '.join(have) or 'no AVX-512'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    parser.add_argument("--coords", type=int, default=200, help="coordinates of each network, at least")
    parser.add_argument("--batch", type=int, help="images, for every network (default: each its own)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", type=Path, help="folder of trained weights (default: $DZHPC_DATA/weights)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", default="", help="networks whose name has this in it")
    args = parser.parse_args()
    devices.choose(0, args.threads) if args.device == "cuda" else devices.cpu(args.threads)
    if args.weights is None and "DZHPC_DATA" in os.environ:
        args.weights = Path(os.environ["DZHPC_DATA"]) / "weights"
    torch.manual_seed(0)
    inputs, labels, what = images(max(case.batch for case in CASES))
    command = " ".join(["python", *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv)])
    text = HEAD.format(
        command=command, machine=machine(), threads=args.threads, python=platform.python_version(), torch=torch.__version__,
        images=what, zero=ZERO,
    )  # fmt: skip
    for case in CASES:
        if args.only not in case.name:
            continue
        case.batch = args.batch or case.batch
        if case.weights and (args.weights is None or not (args.weights / case.weights).exists()):
            text += f"| {case.name} | | | | no file {case.weights} | | | | |\n"
            continue
        text += "".join(line + "\n" for line in row(case, args, inputs, labels))
        args.out.write_text(text)


if __name__ == "__main__":
    main()
