"""Recipes for training from scratch, judged by test accuracy at equally many queries, three seeds.

    python benchmarks/recipes.py sgd --steps 360 --seeds 0,1,2            # stand-in: autograd's gradient on the S of CGE
    python benchmarks/recipes.py gauss-newton --steps 120                 # by CGE, engine delta
    python benchmarks/recipes.py rate --steps 240 --seeds 0,1             # the best rate against sparsity, stand-in
    python benchmarks/recipes.py table                                    # of all that FILE (--out) has

A simple CNN of depth 2 (3,700 parameters) on CIFAR-10 at 16 x 16 pixels, 10,000 training and all 10,000 test images, 5 % of the
coordinates drawn anew at each step, cosine rate after a short warm-up. Every run also gives that of the mean of its weights
over the last third of its steps. Lines are appended to FILE; what is there already is skipped.
"""

import argparse
import itertools
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from dzhpc import config, data, make_engine
from dzhpc.method import gauss_newton as method
from dzhpc.method import scores
from dzhpc.models.cnn import SimpleCNN

SGD = {"lr": 0.3, "momentum": 0.9, "warmup": 1 / 16, "batch": 128, "keep": 0.05}
NEWTON = {**SGD, "lr": 0.1, "damping": 0.03}
RECIPES = {
    "sgd": {
        "as it is": {},
        "rate 0.1": {"lr": 0.1},
        "rate 1": {"lr": 1.0},
        "Nesterov": {"nesterov": True},
        "label smoothing 0.1": {"smoothing": 0.1},
        "no warm-up": {"warmup": 0.0},
        "warm-up over a quarter": {"warmup": 0.25},
        "batch 32, doubled four times": {"growth": 5},
        "batch 512": {"batch": 512},
        "adaptive S": {"adaptive": "gradient"},
        "Muon 0.003": {"muon": 0.003},
        "Muon 0.01": {"muon": 0.01},
        "Muon 0.03": {"muon": 0.03},
        "Muon 0.1": {"muon": 0.1},
        "Muon 0.03, adaptive S": {"muon": 0.03, "adaptive": "gradient"},
        "Muon 0.03, batch 512": {"muon": 0.03, "batch": 512},
    },
    "gauss-newton": {
        "as it is": {},
        "lambda 0.01": {"damping": 0.01},
        "lambda 0.1": {"damping": 0.1},
        "lambda 0.1, rate 0.2": {"damping": 0.1, "lr": 0.2},
        "rate 0.05": {"lr": 0.05},
        "Nesterov": {"nesterov": True},
        "label smoothing 0.1": {"smoothing": 0.1},
        "no warm-up": {"warmup": 0.0},
        "warm-up over a quarter": {"warmup": 0.25},
        "batch 32, doubled four times": {"growth": 5},
        "batch 512": {"batch": 512},
        "adaptive S by ghat^2": {"adaptive": "gradient"},
        "adaptive S by ghat^2 / H_jj": {"adaptive": "decrease"},
        "S for 3 steps, H averaged 0.67": {"redraw": 3, "average": 0.67},
        "Muon on the step 0.01": {"muon": 0.01},
        "Muon on the step 0.03": {"muon": 0.03},
    },
}
MU = 1e-3


class Images:
    """CIFAR-10 at 16 x 16 pixels, as a network wants it."""

    def __init__(self):
        found = data.load(config.load(None, ["data.name=cifar10", "data.train_limit=10000"]).data, 0)
        small = lambda split: F.avg_pool2d(found.normalise(split.images), 2).contiguous(memory_format=torch.channels_last)  # noqa: E731
        self.inputs, self.labels = small(found.train), found.train.labels
        self.test, self.truth = small(found.test), found.test.labels

    @torch.no_grad()
    def judged(self, model: nn.Module) -> tuple[float, float]:
        """(test accuracy in %, loss)."""
        model.eval()
        outputs = torch.cat([model(part) for part in self.test.split(2000)])
        model.train()
        return 100 * float((outputs.argmax(1) == self.truth).float().mean()), float(F.cross_entropy(outputs, self.truth))


def run(images: Images, kind: str, options: dict, seed: int, steps: int) -> list[tuple[float, float]]:
    """[(accuracy, loss) of the last weights, of their mean over the last third]."""
    torch.manual_seed(seed)
    model, draw = SimpleCNN(depth=2).to(memory_format=torch.channels_last), torch.Generator().manual_seed(seed + 1000)
    o = {"smoothing": 0.0, "growth": 1, "redraw": 1, "average": 0.0, "adaptive": None, **options}
    loss = lambda z, y: F.cross_entropy(z.double(), y, label_smoothing=o["smoothing"])  # noqa: E731
    smoothed = lambda y: F.one_hot(y, 10).double() * (1 - o["smoothing"]) + o["smoothing"] / 10  # noqa: E731
    engine = make_engine("delta", model, "cross_entropy") if kind == "gauss-newton" else make_engine("full", model, loss)
    index = engine.index
    lpr = scores.lpr_from_scores(scores.random_scores(index, seed), index, list(index.names), 1 - o["keep"], "signed", "")
    optimizers = made(model, o)
    rates, sizes, state = [g["lr"] for q in optimizers for g in q.param_groups], torch.zeros(index.size).double(), {}
    averaged = AveragedModel(model)
    for t in range(steps):
        size = o["batch"] if o["growth"] == 1 else 32 * 2 ** (o["growth"] * t // steps)
        chosen = torch.randint(0, len(images.labels), (size,), generator=draw)
        x, y = images.inputs[chosen], images.labels[chosen]
        engine.bind(x, smoothed(y) if o["smoothing"] and kind == "gauss-newton" else y)
        if o["adaptive"]:
            coords = scores.adapted(lpr, index, seed, t, sizes, 0.5)
        else:
            coords = scores.draw(lpr if o["keep"] < 1 else None, index, seed, t // o["redraw"])
        if kind == "gauss-newton":
            update, gradient, diagonal, state = newton(engine, coords, state, o)
        else:
            update = gradient = index.flatten(engine.gradient())[coords]
            diagonal = torch.ones(len(coords))
        if o["adaptive"]:
            given = gradient.double().square() / (diagonal.clamp_min(1e-30) if o["adaptive"] == "decrease" else 1)
            sizes = scores.running(sizes, coords, given)
        flat = torch.zeros(index.size)
        flat[coords] = update.float()
        for p, g in zip(index.parameters, index.split(flat).values(), strict=True):
            p.grad = g
        warm = o["warmup"] * steps
        factor = (t + 1) / math.ceil(warm) if t < warm else 0.5 * (1 + math.cos(math.pi * (t - warm) / (steps - warm)))
        for group, rate in zip((g for q in optimizers for g in q.param_groups), rates, strict=True):
            group["lr"] = rate * factor
        step(optimizers)
        if t >= 2 * steps // 3:
            averaged.update_parameters(model)
    update_bn(images.inputs[:4096].split(512), averaged)
    return [images.judged(model), images.judged(averaged)]


def newton(engine, coords: Tensor, state: dict, o: dict) -> tuple[Tensor, Tensor, Tensor, dict]:
    """(the damped solution, gradient, diagonal of H, averages) of the coordinates, from their columns by queries."""
    columns = method.columns(engine, coords, MU, "forward").double()
    now = {"gradient": columns[:, 0], "hessian": columns[:, 2:] @ columns[:, 2:].T}
    state = method.averaged(state, coords, now, {"gradient": 0.0, "hessian": o["average"]})
    diagonal = state["hessian"].diagonal()
    solution = method.System(now["gradient"], diagonal, "absolute", state["hessian"]).solve(o["damping"])
    return -solution, now["gradient"], diagonal, state


def made(model: nn.Module, o: dict) -> list[torch.optim.Optimizer]:
    """torch's optimisers: SGD, or Muon for matrices and kernels beside SGD for the rest."""
    parameters = list(model.parameters())
    sgd = lambda some: torch.optim.SGD(some, lr=o["lr"], momentum=o["momentum"], nesterov=o.get("nesterov", False))  # noqa: E731
    if "muon" not in o:
        return [sgd(parameters)]
    views = []
    for p in parameters:
        if p.ndim > 1:
            views.append(nn.Parameter(p.detach().flatten(1).clone()))
            views[-1].of = p
    muon = torch.optim.Muon(views, lr=o["muon"], weight_decay=0.0, momentum=0.95)
    return [muon, sgd([p for p in parameters if p.ndim == 1])]


def step(optimizers: list[torch.optim.Optimizer]) -> None:
    """One step of each; Muon's parameters are matrices, and views of the kernels that they stand for."""
    for optimizer in optimizers:
        views = optimizer.param_groups[0]["params"] if isinstance(optimizer, torch.optim.Muon) else []
        for view in views:
            view.grad = view.of.grad.reshape(view.shape)
            view.data.copy_(view.of.data.reshape(view.shape))
        optimizer.step()
        for view in views:
            view.of.data.copy_(view.data.view(view.of.shape))


def spread(seeds: dict[str, list[float]], k: int) -> str:
    """Mean and standard deviation of number k over seeds."""
    values = [numbers[k] for numbers in seeds.values()]
    return f"{np.mean(values):.4g} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.2g}"


def table(lines: list[str]) -> str:
    """Mean over seeds and standard deviation, and the difference to the first recipe of a kind, paired by seed."""
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for line in lines:
        kind, name, seed, steps, *numbers = (cell.strip() for cell in line.strip("|\n ").split("|"))
        found.setdefault((kind, steps, name), {})[seed] = [float(number) for number in numbers]
    rows = [
        "| update | steps | recipe | seeds | accuracy in % | against the first | loss | accuracy of the mean of weights |",
        "|---" * 8 + "|",
    ]
    first: dict[str, dict[str, list[float]]] = {}
    for (kind, steps, name), seeds in found.items():
        base = first.setdefault(kind, seeds)
        paired = [seeds[s][0] - base[s][0] for s in seeds if s in base]
        numbers = " | ".join([spread(seeds, 0), f"{np.mean(paired):+.2f}", spread(seeds, 1), spread(seeds, 2)])
        rows.append(f"| {kind} | {steps} | {name} | {len(seeds)} | {numbers} |")
    return "\n".join(rows)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("kind", choices=["sgd", "gauss-newton", "rate", "table"])
    p.add_argument("--steps", type=int, default=120)
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--only", default="", help="recipes that begin with this")
    p.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = p.parse_args()
    if args.kind == "table":
        print(table(args.out.read_text().splitlines()))
        return
    torch.set_num_threads(1)
    images, base = Images(), NEWTON if args.kind == "gauss-newton" else SGD
    recipes = RECIPES.get(args.kind) or {
        f"{keep:g} of the coordinates, rate {lr:g}": {"keep": keep, "lr": lr}
        for keep, lr in itertools.product((1.0, 0.2, 0.05, 0.01), (0.03, 0.1, 0.3, 1.0, 3.0))
    }
    done = {tuple(line.split("|")[1:4]) for line in args.out.read_text().splitlines()} if args.out.exists() else set()
    for seed, (name, options) in itertools.product(map(int, args.seeds.split(",")), recipes.items()):
        key = (f" {args.kind} ", f" {name} ", f" {seed} ")
        if not name.startswith(args.only) or key in done:
            continue
        start = time.process_time()
        found = run(images, args.kind, {**base, **options}, seed, args.steps)
        numbers = " | ".join(f"{value:.2f} | {loss:.4f}" for value, loss in found)
        with args.out.open("a") as file:
            print(f"|{'|'.join(key)}| {args.steps} | {numbers} | {time.process_time() - start:.0f} |", file=file)


if __name__ == "__main__":
    main()
