"""Engine ``delta`` against ``reuse``, and ``reuse`` against a partial pass written by hand: the table of results/delta.md.

    python benchmarks/engines.py --out FOLDER
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/engines.py --out FOLDER       # without AVX-512

Writes FOLDER/engines-SET.json and .md for the instruction set at hand, after every row. One thread, batch 128, random images and
weights, coordinates drawn over the whole network by first-order GraSP's ratios. Engines take turns; times are those of the
processor, so that other work beside disturbs less; a ratio is the median of those of the repetitions. FLOP are counted where our
own library makes convolutions: those of the direct algorithm, and those that are made (Winograd's are fewer). Bytes are those of
changes and base values that its calls read and write.
"""

import argparse
import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dzhpc.engines import make_engine
from dzhpc.engines.kernels import build, compiled, library
from dzhpc.job import device as devices
from dzhpc.job import processor
from dzhpc.training import benchmark

MU = 5e-3
ROWS = [("cnn:1", 0.0, 730), ("cnn:1", 0.9, 200), ("cnn:3", 0.0, 1500), ("cnn:3", 0.9, 1000), ("resnet20", 0.9, 1000)]
ASKED = {"cnn:1": 100, "cnn:3": 100, "resnet20": 60}  # coordinates of each row that `reuse` is asked for
TARGETS = {  # times reuse: on AVX2, on AVX-512
    ("cnn:1", 0.0, "fp32"): (100, 100), ("cnn:1", 0.9, "fp32"): (50, 60), ("cnn:3", 0.0, "fp32"): (12, 20),
    ("resnet20", 0.9, "fp32"): (2.2, 2.2), ("resnet20", 0.9, "bf16"): (None, 4),
}  # fmt: skip
CALLS = (
    "convolutions and the pass behind",
    "one-channel convolutions and the pass behind",
    "passes alone",
    "other convolutions, linear",
)


def clock() -> float:
    """Seconds of this process."""
    return time.process_time()


def seconds(work: Callable[[], object]) -> float:
    """What a call takes."""
    start = clock()
    work()
    return clock() - start


def peak() -> tuple[float, float]:
    """(FLOP/s of products and sums in registers, bytes/s of a copy of 64 MiB) of this core, with the engine's own flags."""
    flags = library._flags()
    core = build.shared_library(
        Path(__file__).with_name("peak.cpp"), compiled.compiler(), ("-ffp-contract=fast", "-Wno-psabi", *flags)
    )
    core.multiply_add.restype = ctypes.c_double
    factor, rounds = (ctypes.c_float * 32)(*[0.5] * 32), 2 * 10**6
    fastest = min(seconds(lambda: core.multiply_add(ctypes.c_long(rounds), factor)) for _ in range(15))
    source = torch.zeros(2**24)
    target = torch.empty_like(source)
    copied = min(seconds(lambda: target.copy_(source)) for _ in range(10))
    return 24 * core.lanes() * rounds / fastest, 2 * source.numel() * 4 / copied


class Counted:
    """Seconds, FLOP of the direct algorithm, FLOP made and bytes of each kind of the library's calls."""

    def __init__(self):
        self.rows = {kind: [0.0] * 4 for kind in CALLS}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within, calls are counted."""
        carry, convolve = library.Library.carry, library.Library.convolve
        library.Library.carry = lambda *given, **named: self._counted(carry, given, named)
        library.Library.convolve = lambda *given, **named: self._convolution(convolve, given, named)
        try:
            yield
        finally:
            library.Library.carry, library.Library.convolve = carry, convolve

    def _add(self, kind: str, *figures: float) -> None:
        self.rows[kind] = [a + b for a, b in zip(self.rows[kind], figures, strict=True)]

    def _convolution(self, convolve: Callable, given: tuple, named: dict) -> object:
        start = clock()
        out = convolve(*given, **named)
        taken, (_, images, _, _, window, _, centred, how) = clock() - start, given
        flop, made = _flop(out[0].numel(), window, images.shape[2], how)
        moved = [images, out[0], *([] if centred is None else [centred])]
        self._add(CALLS[3], taken, flop, made, sum(map(_bytes, moved)))
        return out

    def _counted(self, carry: Callable, given: tuple, named: dict) -> Tensor:
        start = clock()
        out = carry(*given, **named)
        taken, (_, source, shape, dtype, norm, residual, _, _, _, value, left_over) = clock() - start, given
        size = 4 if dtype == torch.float32 else 2
        beside = [norm and norm.centred, value, left_over]
        moved = _bytes(out) + sum(_bytes(t) for t in beside if t is not None)
        moved += 0 if residual is None else _bytes(residual[0] if isinstance(residual, tuple) else residual)
        values = int(np.prod(shape))
        if isinstance(source, library.Layer):
            made_here = len(source.images) * values
            flop = _flop(made_here, source.window, source.images.shape[2], source.how)
            again = _bytes(norm.centred) if norm else 0
            self._add(CALLS[0], taken, *flop, moved + _bytes(source.images) + 2 * made_here * size + again)
        elif isinstance(source, library.Planes) and source.columns is not None:
            flop = 2 * source.columns.numel() * values / shape[1]
            self._add(CALLS[1], taken, flop, 2 * flop if norm else flop, moved + _bytes(source.data))
        else:
            self._add(CALLS[2], taken, 0, 0, moved + (_bytes(source) if isinstance(source, Tensor) else 0))
        return out


def _flop(outputs: int, window: object, channels: int, how: str) -> tuple[float, float]:
    """(of the direct algorithm, those that are made of products with weights)."""
    direct = 2.0 * outputs * channels * window.kernel[0] * window.kernel[1]
    return direct, direct / 4 if how == "winograd" else direct


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


class ByHand:
    """The partial pass that one would write for ResNet-20 or a simple CNN: what comes before the perturbed layer is kept."""

    def __init__(self, model: nn.Module, inputs: Tensor, labels: Tensor):
        self.labels, self.steps, self.starts = labels, [], {}
        mean = lambda x: x.mean((2, 3))  # noqa: E731
        if hasattr(model, "features"):
            layers = [*model.features, mean, model.fc]
        else:
            layers = [model.conv1, model.bn1, F.relu]
            for block in (b for k in range(model.stages) for b in getattr(model, f"layer{k + 1}")):
                layers += [("keep", block), block.conv1, block.bn1, F.relu, block.conv2, block.bn2, ("add", block), F.relu]
            layers += [mean, model.linear]
        self.steps, self.kept, x, shortcut = layers, [], inputs, None
        with torch.no_grad():
            for k, step in enumerate(layers):
                self.kept.append((x, shortcut))
                for p in step.parameters() if isinstance(step, nn.Module) else ():
                    self.starts[id(p)] = k
                x, shortcut = self._step(step, x, shortcut)
        self.base = F.cross_entropy(x, labels)

    @staticmethod
    def _step(step: object, x: Tensor, shortcut: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if isinstance(step, tuple):
            return (x, step[1].shortcut(x)) if step[0] == "keep" else (x + shortcut, None)
        return step(x), shortcut

    @torch.no_grad()
    def differences(self, places: list[tuple[Tensor, Tensor]], mu: float) -> list[float]:
        """l(theta + mu e_j) - l(theta) for elements (parameter, its element as a scalar view)."""
        found = []
        for parameter, element in places:
            before = element.clone()
            element.add_(mu)
            k = self.starts[id(parameter)]
            x, shortcut = self.kept[k]
            for step in self.steps[k:]:
                x, shortcut = self._step(step, x, shortcut)
            found.append(float(F.cross_entropy(x, self.labels) - self.base))
            element.copy_(before)
        return found


def row(name: str, ratio: float, count: int, repeats: int, found: dict) -> list[dict]:
    """Figures of one network: engines in turns, reuse and the partial pass by hand on a fair part of the coordinates."""
    args = argparse.Namespace(model=name, weights=None, seed=0, batch=128, coords=count, ratio=ratio)
    model, inputs, labels = benchmark.problem(args, torch.device("cpu"))
    coords = benchmark.coordinates(model, inputs, labels, args)
    few = np.linspace(0, len(coords) - 1, min(len(coords), ASKED[name])).astype(int)
    precisions = ["fp32", "bf16"] if devices.has_fast_bf16(torch.device("cpu")) else ["fp32"]
    reuse, engines = (
        make_engine("reuse", model, "cross_entropy"),
        {p: make_engine("delta", model, "cross_entropy", p) for p in precisions},
    )
    first = {}
    for key, engine in {"reuse": reuse, **engines}.items():
        bind = seconds(lambda e=engine: e.bind(inputs, labels))
        first[key] = bind, seconds(lambda e=engine: e.differences(coords[few], MU))
    hand = ByHand(model, inputs, labels)
    places = [(reuse.index.parameters[owner], element) for owner, element in map(reuse.index.element, coords[few].tolist())]
    apart = np.array(hand.differences(places, MU)) - reuse.differences(coords[few], MU).numpy()
    assert np.abs(apart).max() < 1e-4, "the partial pass by hand is another network"
    taken: dict[str, list[float]] = {key: [] for key in ("reuse", "hand", *precisions)}
    for _ in range(repeats):
        taken["reuse"].append(seconds(lambda: reuse.differences(coords[few], MU)) / len(few))
        taken["hand"].append(seconds(lambda: hand.differences(places, MU)) / len(few))
        for p, engine in engines.items():
            taken[p].append(seconds(lambda e=engine: e.differences(coords, MU)) / len(coords))
    rows = []
    for p, engine in engines.items():
        counted = Counted()
        with counted.watching():
            whole = seconds(lambda e=engine: e.differences(coords, MU))
        per = lambda k, c=counted: sum(r[k] for r in c.rows.values()) / len(coords)  # noqa: E731
        times = statistics.median(r / d for r, d in zip(taken["reuse"], taken[p], strict=True))
        by_hand = statistics.median(r / h for r, h in zip(taken["reuse"], taken["hand"], strict=True))
        rows.append({
            "model": name, "ratio": ratio, "coordinates": len(coords), "precision": p, "times_reuse": times,
            "ms": 1e3 * statistics.median(taken[p]), "ms_min": 1e3 * min(taken[p]), "ms_max": 1e3 * max(taken[p]),
            "reuse_ms": 1e3 * statistics.median(taken["reuse"]), "reuse_by_hand": by_hand, "bind_s": first[p][0],
            "gflop": per(1) / 1e9, "gflop_made": per(2) / 1e9, "mb": per(3) / 1e6,
            "share_of_peak": per(2) / statistics.median(taken[p]) / found["peak_flops"],
            "work": {k: dict(zip(("share", "gflop", "gflop_made", "mb"), (r[0] / whole, *(v / len(coords) / s for v, s in
                     zip(r[1:], (1e9, 1e9, 1e6), strict=True))), strict=True)) for k, r in counted.rows.items()},
        })  # fmt: skip
    return rows


FIRST = """
import sys, time, torch
from dzhpc.engines import make_engine
from dzhpc.models.resnet import resnet20
torch.set_num_threads(1); torch.manual_seed(0)
model = resnet20().to(memory_format=torch.channels_last)
images, labels = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last), torch.arange(128) % 10
engine = make_engine("delta", model, "cross_entropy")
coords = range(0, engine.index.size, 2000)
times = []
for _ in range(3):
    start = time.perf_counter()
    engine.bind(images, labels)
    engine.differences(coords, 5e-3)
    times.append(time.perf_counter() - start)
print(times[0] - min(times[1:]))
"""


def first_gradient() -> float:
    """Seconds that ResNet-20's first gradient takes above a later one, nothing compiled before."""
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        return float(subprocess.run([sys.executable, "-c", FIRST], env=env, capture_output=True, text=True, check=True).stdout)


def training() -> float:
    """Seconds of `make run`'s training on two ranks as a whole command, nothing compiled before."""
    with tempfile.TemporaryDirectory() as place:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{place}/cache"}
        beside = Path(sys.executable).with_name("mpirun")
        program = [sys.executable, "-m", "dzhpc.train", "inputs/digits.toml", "--run-dir", f"{place}/run"]
        command = [beside if beside.exists() else "mpirun", "--allow-run-as-root", "-n", "2", *program]
        start = time.perf_counter()
        subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, check=True)
        return time.perf_counter() - start


def table(found: dict) -> str:
    """Markdown."""
    wide = found["instruction set"].startswith("avx512")
    lines = [
        f"{found['cpu']}; {found['instruction set']}; torch {found['torch']}; {found['date']}. Peak of the core in the same run: "
        f"{found['peak_flops'] / 1e9:.0f} GFLOP/s in fp32, copy {found['copy_bytes'] / 1e9:.0f} GB/s.\n",
        "| network | R | coordinates | precision | times reuse | wanted | ms a query (min to max) | reuse, ms | reuse by hand | "
        "GFLOP a query: direct, made | MB a query | share of peak |",
        "|---" * 12 + "|",
    ]
    for r in found["rows"]:
        wanted = TARGETS.get((r["model"], r["ratio"], r["precision"]), (None, None))[wide]
        cells = [r["model"], f"{r['ratio']:g}", r["coordinates"], r["precision"], f"{r['times_reuse']:.3g}", wanted or "",
                 f"{r['ms']:.3g} ({r['ms_min']:.3g} to {r['ms_max']:.3g})", f"{r['reuse_ms']:.3g}", f"{r['reuse_by_hand']:.2f}",
                 f"{r['gflop']:.3g}, {r['gflop_made']:.3g}", f"{r['mb']:.3g}", f"{100 * r['share_of_peak']:.0f} %"]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append("\nWhere the time of a gradient goes:\n")
    lines += ["| network | R | precision | " + " | ".join(CALLS) + " | the rest |", "|---" * (4 + len(CALLS)) + "|"]
    for r in found["rows"]:
        shares = [r["work"][kind]["share"] for kind in CALLS]
        cells = [r["model"], f"{r['ratio']:g}", r["precision"], *(f"{100 * s:.0f} %" for s in (*shares, 1 - sum(shares)))]
        lines.append(f"| {' | '.join(cells)} |")
    for key, text in (
        ("first_s", "First ResNet-20 gradient above a later one, cold caches"),
        ("run_s", "`make run`, training as a whole command, cold caches"),
    ):
        if key in found:
            lines.append(f"\n{text}: {found[key]:.1f} s.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="rows whose network has this in its name; then nothing is started cold")
    parser.add_argument("--part", type=float, default=1, help="of the coordinates: for a quick look")
    args = parser.parse_args()
    devices.cpu(1)
    args.out.mkdir(parents=True, exist_ok=True)
    flops, copied = peak()
    found = {**benchmark.machine(), "date": time.strftime("%d %B %Y"), "peak_flops": flops, "copy_bytes": copied, "rows": []}
    stem = args.out / f"engines-{processor.instruction_set()}"

    def write() -> None:
        stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        stem.with_suffix(".md").write_text(table(found))

    for name, ratio, count in ROWS:
        if args.only in name:
            found["rows"] += row(name, ratio, max(20, int(args.part * count)), args.repeats, found)
            write()
    if not args.only:
        found["first_s"], found["run_s"] = first_gradient(), training()
        write()
    print(stem.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
