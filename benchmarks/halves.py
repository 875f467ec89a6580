"""Torch's 3 x 3 convolution against the engine's own, on changes of many shapes: ``python benchmarks/halves.py [--batch 128]``.

Both sides take turns on one thread; times are medians. Shapes are CHANNELS:OUTPUTS:SIZE:COORDINATES.
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F

from dzhpc.engines.kernels import halves as winograd
from dzhpc.job import device

SHAPES = "8:8:16:8 12:12:16:4 18:18:8:2 16:16:32:1 32:32:16:2 64:64:8:4 128:128:8:2 256:256:8:1 512:512:4:1 512:512:8:1"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", default=SHAPES.split())
    parser.add_argument("--compiler", default="g++")
    args = parser.parse_args()
    device.cpu(1)
    convolve = winograd.Halves(args.compiler)
    print("| type | channels | outputs | size | coordinates | torch, ms | Winograd, ms | with means, ms | times torch |")
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in args.shapes:
            channels, outputs, size, coords = map(int, shape.split(":"))
            merged = torch.randn(coords * args.batch, channels, size, size).to(dtype, memory_format=torch.channels_last)
            images, weight = merged.unflatten(0, (coords, args.batch)), torch.randn(outputs, channels, 3, 3)
            centred = torch.randn(args.batch, outputs, size, size).to(dtype, memory_format=torch.channels_last)
            kernels, plain, border = winograd.transformed(weight, dtype), weight.to(dtype), (1, 1, 1, 1)
            ways = (
                lambda x=merged, w=plain: F.conv2d(x, w, None, 1, 1),
                lambda x=images, k=kernels, o=outputs, b=border: convolve(x, k, o, b),
                lambda x=images, k=kernels, o=outputs, b=border, c=centred: convolve(x, k, o, b, c),
            )
            seconds = np.array([[_timed(way) for way in ways] for _ in range(args.repeats)])
            medians = 1e3 * np.median(seconds, axis=0)
            cells = [str(dtype)[6:], *map(str, (channels, outputs, size, coords)), *(f"{m:.2f}" for m in medians)]
            print("| " + " | ".join([*cells, f"{np.median(seconds[:, 0] / seconds[:, 1]):.2f}"]) + " |")


def _timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
