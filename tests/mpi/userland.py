"""What a user would write: losses, a network, a data set. The tests put this file beside their input files."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import torch

from dzhpc.method.estimators import CGE, RGE

HERE = Path(__file__).parent
TARGET = np.array([0.3, -1.2, 2.0])
RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))


class Bowl:
    """A quadratic in float64 whose minimum is TARGET: three coordinates."""

    def initial(self):
        return np.zeros(3)

    def __call__(self, thetas, step):
        return ((thetas - TARGET) ** 2 @ np.array([1.0, 2.0, 3.0])) + 0.01 * np.sin(thetas).sum(1)


class Rings:
    """Two named blocks in float32, torch; the loss depends on the step."""

    def initial(self):
        return {"slow": torch.linspace(-1, 1, 7), "fast": torch.linspace(0.5, 2, 10).reshape(2, 5)}

    def __call__(self, thetas, step):
        scale = torch.arange(1, 18) / 10
        return ((thetas**2 - 1) ** 2 * scale).sum(1) + 0.1 * torch.cos(thetas * (1 + step % 3)).sum(1)


class Slow(Bowl):
    """Bowl that lingers while a file ``slow`` lies here, and writes down the step and the process of each rank."""

    def initial(self):
        if (HERE / "slow-start").exists():
            (HERE / f"at.{RANK}").write_text(f"0 {os.getpid()}")
            time.sleep(1.5)
        return super().initial()

    def __call__(self, thetas, step):
        (HERE / f"at.{RANK}").write_text(f"{step} {os.getpid()}")
        if (HERE / "slow").exists() and step > 3:
            time.sleep(0.15)
        return super().__call__(thetas, step)


class Stopped(Bowl):
    """Bowl whose user puts the file STOP into the run folder at step 4."""

    def __call__(self, thetas, step):
        if step == 4 and (HERE / "once").exists():
            (HERE / "once").unlink(missing_ok=True)
            (HERE / "stopped" / "STOP").touch()
        time.sleep(0.06)
        return super().__call__(thetas, step)


class NotANumber(Bowl):
    """NaN once coordinate 1 is perturbed at step 3; the rank that met it leaves its name."""

    def __call__(self, thetas, step):
        losses = super().__call__(thetas, step)
        if getattr(self, "step", None) != step:
            self.step, self.base = step, thetas[0].copy()  # the base pass comes first
        if step == 3:
            moved = thetas[:, 1] != self.base[1]
            if moved.any():
                (HERE / "nan-rank").write_text(str(RANK))
            losses[moved] = np.nan
        return losses


class NoDirection(Bowl):
    """NaN for whatever rank 1 is asked beyond the base pass of step 3."""

    def __call__(self, thetas, step):
        losses = super().__call__(thetas, step)
        if step == 3 and RANK == 1 and getattr(self, "step", None) == step:
            losses[:] = np.nan
        self.step = step
        return losses


class Disagrees(Bowl):
    """Starts elsewhere on rank 1."""

    def initial(self):
        return np.full(3, float(RANK))


class Noisy(Bowl):
    """No function of theta and step: every process has noise of its own."""

    def __call__(self, thetas, step):
        return super().__call__(thetas, step) + np.random.default_rng().normal(size=len(thetas))


class Infeasible(Bowl):
    """Only theta0 itself is feasible."""

    def __call__(self, thetas, step):
        return np.where((thetas != 0).any(1), np.inf, super().__call__(thetas, step))


class FailsToStart(Bowl):
    """Rank 1 does not get what the others get."""

    def initial(self):
        if RANK == 1:
            raise ConnectionError("no license left")
        return super().initial()


class Raises(Bowl):
    """Raises on rank 1 alone, at step 2."""

    def __call__(self, thetas, step):
        if step == 2 and RANK == 1:
            raise FloatingPointError("the solver diverged")
        return super().__call__(thetas, step)


class Leaves(Bowl):
    """Calls sys.exit on rank 1 alone, at step 2."""

    def __call__(self, thetas, step):
        if step == 2 and RANK == 1:
            raise SystemExit("license server not reached")
        return super().__call__(thetas, step)


class RaisesEverywhere(Bowl):
    """Raises on every rank in the base pass of step 3, where none of them is asked for an evaluation."""

    def __call__(self, thetas, step):
        if step == 3:
            raise FloatingPointError("the solver diverged")
        return super().__call__(thetas, step)


class RaisesAtOnce(Bowl):
    """Raises on every rank whenever it is called."""

    def __call__(self, thetas, step):
        raise FloatingPointError("no license")


class WrongShape(Bowl):
    """One loss too many."""

    def __call__(self, thetas, step):
        return np.append(super().__call__(thetas, step), 0.0)


class FullDisk(Bowl):
    """From step 2 on no file may grow beyond 4 KiB: what a full disk or a quota looks like."""

    def __call__(self, thetas, step):
        if step == 2:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        return super().__call__(thetas, step)


class LongStep(Bowl):
    """24 coordinates; from step 1 on calls linger while a file ``long`` lies here; each rank writes down step and process."""

    def initial(self):
        return np.linspace(-1, 1, 24)

    def __call__(self, thetas, step):
        (HERE / f"at.{RANK}").write_text(f"{step} {os.getpid()}")
        if step > 0 and (HERE / "long").exists():
            time.sleep(0.25)
        return ((thetas**2 - 1) ** 2).sum(1) + np.sin(thetas * (step + 1)).sum(1)


class Outage(LongStep):
    """LongStep that raises on one rank in one call of one step, where DOWN="RANK STEP CALL" says so; calls count from 0.

    WARNED: the rank receives SIGUSR1 just before, as if that had ended a program that it runs.
    """

    step, calls = -1, 0

    def __call__(self, thetas, step):
        self.step, self.calls = step, self.calls + 1 if step == self.step else 0
        if os.environ.get("DOWN") == f"{RANK} {step} {self.calls}":
            if "WARNED" in os.environ:
                os.kill(os.getpid(), signal.SIGUSR1)
            raise ConnectionError("no license left")
        return super().__call__(thetas, step)


class Iterates(Bowl):
    """A solver that converges slowly where a stiffness, every third coordinate, is moved: heavy tails; notes when it is asked."""

    def initial(self):
        return np.linspace(-1, 1, 120)

    def __call__(self, thetas, step):
        start = time.monotonic()
        moved = int(np.abs(thetas[0] - self.base).argmax()) if step == self.bound else -1
        if moved < 0:
            self.base, self.bound = thetas[0].copy(), step
        seconds = 0.05 + 0.05 * (moved * 37 % 101 / 100) ** 8 if moved % 3 == 2 else 0.002
        time.sleep(seconds)
        with open(HERE / f"calls.{os.environ['BOX']}.{RANK}", "a") as file:
            file.write(f"{step} {start} {time.monotonic()}\n")
        return ((thetas**2 - 1) ** 2).sum(1)

    bound, base = -1, np.zeros(120)


class Waves:
    """Residuals of 40 numbers with 24 coordinates, another record at each step; raises as Outage does, or in a "trial"."""

    step, calls, base = -1, 0, None

    def initial(self):
        return np.linspace(-1, 1, 24)

    def residuals(self, thetas, step):
        self.step, self.calls = step, self.calls + 1 if step == self.step else 0
        self.base = self.base if self.calls else thetas[0].copy()
        call = "trial" if ((thetas != self.base).sum(1) > 1).any() else self.calls
        if os.environ.get("DOWN") == f"{RANK} {step} {call}":
            raise ConnectionError("no license left")
        draw = np.random.default_rng(step)
        a, b = draw.standard_normal((24, 40)), draw.standard_normal(40)
        return np.sin(thetas) @ a - b + 0.1 * (thetas**2) @ np.abs(a)


class Still(Waves):
    """One record at all steps."""

    def residuals(self, thetas, step):
        return super().residuals(thetas, 0)


class FullForAWhile(Bowl):
    """No file may grow beyond 4 KiB from step 2 until step 6."""

    def __call__(self, thetas, step):
        import resource

        limit = 4096 if 2 <= step < 6 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return super().__call__(thetas, step)


class DiesWriting:
    """A large theta; the root kills itself when it sees a checkpoint being written from step 3 on, once."""

    def initial(self):
        return np.zeros(1_000_000)

    def __call__(self, thetas, step):
        if RANK == 0 and step == 3 and (HERE / "die").exists():
            (HERE / "die").unlink()
            threading.Thread(target=self.wait_and_die, daemon=True).start()
        return thetas[:, :100].sum(1)

    def wait_and_die(self):
        while not any((HERE / "writing" / "checkpoints").glob("*.tmp")):
            pass
        os.kill(os.getpid(), signal.SIGKILL)


class Net(torch.nn.Module):
    """A small perceptron without BatchNorm; takes the number of classes from the data."""

    def __init__(self, hidden: int = 3, classes: int = 10):
        super().__init__()
        self.hidden, self.out = torch.nn.Linear(16, hidden), torch.nn.Linear(hidden, classes)

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(x.flatten(1))))


class EachBatch(torch.nn.Module):
    """Normalised by each batch at hand, in eval mode, too."""

    def __init__(self, depth: int, width: int, classes: int = 10):
        super().__init__()
        self.norm, self.out = torch.nn.BatchNorm1d(64, track_running_stats=False), torch.nn.Linear(64, classes)

    def forward(self, x):
        return self.out(self.norm(x.flatten(1)))


class Sees(torch.nn.Module):
    """Notes what memory this rank shares with others."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.out = torch.nn.Linear(48, classes)

    def forward(self, x):
        if not isinstance(x, torch.fx.Proxy):
            (HERE / f"smaps.{RANK}").write_text(Path("/proc/self/smaps").read_text())
        return self.out(x.flatten(1))


class Dropout(Net):
    """Net that draws random numbers in its forward pass."""

    def __init__(self, hidden: int = 4, classes: int = 10):
        super().__init__(hidden, classes)
        self.drop = torch.nn.Dropout(0.3)

    def forward(self, x):
        return self.out(self.drop(torch.tanh(self.hidden(x.flatten(1)))))


class LongNet(Dropout):
    """Dropout and BatchNorm; every pass lingers while a file ``long`` lies here."""

    def __init__(self, classes: int = 10):
        super().__init__(4, classes)
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, x):
        if (HERE / "long").exists():
            (HERE / f"at.{RANK}").write_text(f"1 {os.getpid()}")
            time.sleep(0.03)
        return self.out(self.drop(self.norm(torch.tanh(self.hidden(x.flatten(1))))))


class Drifts(Net):
    """Net with a buffer that other ranks see otherwise."""

    def __init__(self, classes: int = 10):
        super().__init__(3, classes)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += RANK
        return super().forward(x)


class SixLogits(torch.nn.Module):
    """Six logits, whatever the data say."""

    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(64, 6)

    def forward(self, x):
        return self.out(x.flatten(1))


def stripes():
    """Three classes of 4 x 4 images, told apart by their brightest row: 105 to train, 30 to test."""
    draw = np.random.default_rng(7)

    def part(n):
        labels = np.arange(n) % 3
        images = draw.integers(0, 60, (n, 1, 4, 4))
        images[np.arange(n), 0, labels] += 180
        return images.astype(np.uint8), labels

    return part(105), part(30)


def noise_of_each_rank():
    """4 x 4 images of noise, 3 MiB, which no two ranks would draw alike."""
    draw = np.random.default_rng(RANK)
    part = lambda n: (draw.integers(0, 255, (n, 3, 4, 4)).astype(np.uint8), np.arange(n) % 3)  # noqa: E731
    return part(50_000), part(12)


def tiles():
    """Two classes of 3 x 4 x 4 images, told apart by colour: 40 to train, 12 to test."""
    draw = np.random.default_rng(5)

    def part(n):
        labels = np.arange(n) % 2
        images = draw.integers(0, 130, (n, 3, 4, 4))
        images[np.arange(n), labels] += 90
        return images.astype(np.uint8), labels

    return part(40), part(12)


def redder(images):
    """Probabilities [N, 2] by the share of red and of green."""
    red, green = images[:, 0].mean((1, 2)), images[:, 1].mean((1, 2))
    p = 1 / (1 + np.exp(-10 * (green - red)))
    return np.stack([1 - p, p], 1)


def redder_by_tenths(images):
    """A classifier that rounds what it says."""
    return redder(images).round(1)


def leave(step):
    """SIGUSR1 for each rank in its first evaluation of step LEAVE; it then is out of patience.

    Not for one rank alone: slices follow from measured times, so that it may have no second piece to leave. Some rank has.
    """
    if os.environ.get("LEAVE") == str(step):
        if not LEFT:
            LEFT.append(step)
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.02)


LEFT: list[int] = []


class LeftCGE(CGE):
    """CGE that is left in the middle of a step."""

    def evaluate(self, engine, coords, step, piece):
        leave(step)
        return super().evaluate(engine, coords, step, piece)


class LeftRGE(RGE):
    """RGE that is left in the middle of a step."""

    def evaluate(self, engine, coords, step, piece):
        leave(step)
        return super().evaluate(engine, coords, step, piece)
