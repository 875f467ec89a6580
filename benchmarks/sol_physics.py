"""What a reference of the wake is worth: ``python benchmarks/sol_physics.py data/wake.h5``

Error of the coarse solver alone (SRC) over 100 and 500 frames beside that of the public code's set-up; Strouhal number f D / U
of the reference, f the largest peak in the spectrum of u behind the rod; divergence of the reference, and of the coarse solver.
The slowest flow still changes within the frames that are kept; for Strouhal numbers make a reference of its own:
``python -m dzhpc.simulate inputs/sol.toml -o long.h5 --set task.warm_up=2000 --set task.frames=2000``
"""

import argparse

import numpy as np
import torch

from dzhpc.tasks.sol import reference
from dzhpc.tasks.sol.phiflow import masks
from dzhpc.tasks.sol.rollout import rollout
from dzhpc.tasks.sol.simulators import make_wake
from dzhpc.tasks.sol.wake import LENGTH, SPEED, Wake, unpack

PUBLISHED = {240e3: 0.145, 480e3: 0.166, 960e3: 0.178, 1920e3: 0.182, 3840e3: 0.182}  # SRC over 500 frames, public set-up
BEHIND = (3.0, 6.0)  # the probe's distances behind the rod's centre, in diameters: all rows between are averaged in power
FINER = 32  # times the frequencies of the plain spectrum


def strouhal(u: np.ndarray, diameter: float, frame: float) -> tuple[float, float]:
    """(f D / U, half the width that a record this short blurs it by) of u [frames, probes], ``frame`` time units apart."""
    u = (u - u.mean(0)) * np.hanning(len(u))[:, None]
    power = (np.abs(np.fft.rfft(u, FINER * len(u), axis=0)) ** 2).sum(1)
    frequencies = np.fft.rfftfreq(FINER * len(u), frame)
    return frequencies[power.argmax()] * diameter / SPEED, diameter / SPEED / (2 * len(u) * frame)


def away_from_rod(wake: Wake) -> torch.Tensor:
    """The cells none of whose faces the rod covers in part [nx, ny]: in others the fine grid's rod has its rim."""
    u, v = unpack(torch.from_numpy(masks(wake)[2]) == 0)
    return u[1:] & u[:-1] & v[:, 1:] & v[:, :-1]


def row(parameter: float, states: torch.Tensor, errors: torch.Tensor, wake: Wake, frame: float, divergences) -> list[str]:
    """A line of the table, of one simulation."""
    u, _ = unpack(states)
    first, last = (int((LENGTH / 2 + b * 2 * wake.radius) / wake.dx) for b in BEHIND)
    number, blur = strouhal(u[:, wake.cells[0] // 2, first:last].double().numpy(), 2 * wake.radius, frame)
    div = divergences(states).abs()
    return [
        f"{parameter:,.0f}", f"{parameter * 10 / 128**2:.1f}", f"{2 * wake.radius * SPEED * parameter / 1e4:,.0f}",
        f"{errors[:100].mean():.4f}", f"{errors[:499].mean():.4f}", str(PUBLISHED.get(parameter, "")),
        f"{number:.3f} ± {blur:.3f}", f"{div[:, away_from_rod(wake)].max():.1e}", f"{div.max():.1e}",
    ]  # fmt: skip


def main() -> None:
    """Print a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file")
    p.add_argument("--simulator", default="projected", choices=("projected", "phiflow"))
    args = p.parse_args()
    torch.set_num_threads(1)
    found, cpu = reference.load(args.file), torch.device("cpu")
    about = found.about
    wake = Wake(about["resolution"], about["radius"])
    simulator, check = make_wake(args.simulator, wake, cpu), make_wake("projected", wake, cpu)
    print(f"{args.file}: {about}\n")
    columns = ["parameter", "Re (paper)", "U D / nu", "MAE(100)", "MAE(500)", "public set-up", "Strouhal"]
    print(" | ".join(["| split", *columns, "max div", "at the rod |"]))
    print("|---" * 10 + "|")
    for split in ("test", "valid", "train"):
        part = getattr(found, split)
        steps = min(499, part.states.shape[1] - 1)
        done = rollout(simulator, None, part, found.where(), steps, keep=(steps,))
        for k, parameter in enumerate(part.parameters.tolist()):
            cells = row(parameter, part.states[k], done.errors[k], wake, about["dt"], check.divergences)
            print(f"| {split} | {' | '.join(cells)} |")
        print(f"| {split} | after {steps} steps of the coarse solver: max div {check.divergence(done.kept[steps]).max():.1e} |")


if __name__ == "__main__":
    main()
