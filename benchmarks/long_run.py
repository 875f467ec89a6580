"""Neither memory nor the time of a step grows with the number of steps: ``python benchmarks/long_run.py``

Two ranks train a small CNN on the digits, milliseconds a step. Exit code 1 where late steps need more than early ones.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

INPUT = """
[model]
name = "cnn"
depth = 1
width = 4
[data]
name = "digits"
batch_size = 32
train_limit = 336
[zo]
engine = "reuse"
mu = 1e-3
[sparsity]
# two active coordinates in three layers
ratio = 0.98
prune = "all"
redraw_steps = 3
q = 6
[optim]
lr = 0.05
warmup_epochs = 0.5
[eval]
batch_size = 360
every_epochs = 5
[stop]
epochs = {steps}
steps = {steps}
[checkpoint]
every_steps = 50
"""
LIMIT = 1800.0  # seconds for a run


@dataclass
class Run:
    """A run of ``steps``: seconds of each step, and (steps done, bytes of real memory of the root) now and then."""

    steps: int
    seconds: np.ndarray
    samples: list[tuple[int, int]]

    def time(self, start: float, end: float) -> float:
        """Median seconds of a step between two parts of the run, such as 0.9 and 1."""
        return float(np.median(self.seconds[round(start * self.steps) : round(end * self.steps)]))

    def memory(self, start: float, end: float) -> float:
        """Median bytes between two parts of the run."""
        return float(np.median([size for step, size in self.samples if start <= step / self.steps < end]))


def measure(launcher: Sequence[str], place: Path, steps: int) -> Run:
    """``launcher -m dzhpc.train`` in the folder ``place``. Raises RuntimeError where it fails."""
    (place / "long.toml").write_text(INPUT.format(steps=steps))
    command = [*launcher, "-m", "dzhpc.train", "long.toml", "--run-dir", "run", "--quiet"]
    samples, end = [], time.monotonic() + LIMIT
    with subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and time.monotonic() < end:
            if done := [int(path.stem[5:]) for path in (place / "run" / "checkpoints").glob("step-*.h5")]:
                ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                samples += [(max(done), size) for size in map(resident, ranks[:1]) if size]
            time.sleep(0.02)
        process.terminate()
        if process.wait() != 0:
            raise RuntimeError(process.stderr.read())
    with h5py.File(place / "run" / "metrics.h5") as file:
        seconds = file["train/step_s"][()]
    return Run(len(seconds), seconds, samples)


def resident(pid: str) -> int:
    """Bytes of real memory, 0 of a process that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def main() -> int:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=2000)
    steps = p.parse_args().steps
    with tempfile.TemporaryDirectory() as place:
        run = measure(["mpirun", "-n", "2", sys.executable], Path(place), steps)
    sizes, seconds = (run.memory(0.1, 0.25), run.memory(0.9, 1)), (run.time(0.1, 0.25), run.time(0.75, 1))
    print(f"resident {sizes[0] / 2**20:.1f} -> {sizes[1] / 2**20:.1f} MiB")
    print(f"a step {1e3 * seconds[0]:.2f} -> {1e3 * seconds[1]:.2f} ms")
    return int(sizes[1] > 1.05 * sizes[0] or seconds[1] > 1.5 * seconds[0])


if __name__ == "__main__":
    sys.exit(main())
