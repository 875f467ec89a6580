"""What belongs to amplifier.toml: the network's first weights, and the figure.

``python examples/amplifier/amplifier.py runs/amplifier``
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from dzhpc.files.checkpoint import load_checkpoint
from dzhpc.tasks.template import Files

HIDDEN = 32
CIRCUIT = Path(__file__).with_name("amplifier.cir")


def initial():
    """97 weights: the tanh units are spread over -6 V ... 6 V, and their outputs are 0, so that nothing is pre-distorted yet."""
    centres = np.linspace(-6, 6, HIDDEN)
    return {"slope": np.full(HIDDEN, 2.0), "shift": -2 * centres, "out": np.zeros(HIDDEN), "constant": np.zeros(())}


def waveforms(weights):
    """Time in s, then v(in), v(pre), v(out) in V over a period [4, N], as ngspice computes them."""
    with tempfile.TemporaryDirectory() as folder:
        Files([str(CIRCUIT)], {name: value.shape for name, value in weights.items()}).write(Path(folder), weights)
        subprocess.run(["ngspice", "-b", CIRCUIT.name], cwd=folder, check=True, capture_output=True, timeout=60)
        columns = np.loadtxt(Path(folder) / "waveform.txt").T
    return columns[[0, 1, 3, 5]]


def spectrum(v):
    """Amplitudes of a period [N + 1] at the frequencies 0, 1, 2, ... kHz."""
    return 2 * np.abs(np.fft.rfft(v[:-1])) / (len(v) - 1)


def distortion(v):
    """Total harmonic distortion in dB: the harmonics 2 to 20 against the first."""
    a = spectrum(v)
    return 20 * np.log10(np.sqrt((a[2:21] ** 2).sum()) / a[1])


def main(run, picture="distortion.png"):
    from matplotlib.figure import Figure

    last = sorted((Path(run) / "checkpoints").glob("step-*.h5"))[-1]
    trained = {name: value.numpy() for name, value in load_checkpoint(last).params.items()}
    states = {"without": waveforms(initial()), "with": waveforms(trained)}
    figure = Figure((9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(1e3 * states["with"][0], states["with"][1], "k:", label="wanted: v(in)")
    for k, (name, (time, _, _, out)) in enumerate(states.items()):
        print(f"{name} network: harmonic distortion {distortion(out):.1f} dB")
        left.plot(1e3 * time, out, f"C{k}", label=f"v(out) {name} network")
        right.bar(np.arange(1, 21) + 0.4 * k - 0.2, 20 * np.log10(spectrum(out)[1:21]) + 120, 0.4, bottom=-120, color=f"C{k}",
                  label=f"{name}: {distortion(out):.1f} dB")  # fmt: skip
    left.plot(1e3 * time, states["with"][2], "C2--", lw=1, label="v(pre) with network")
    left.set(xlabel="time (ms)", ylabel="V")
    right.set(xlabel="frequency (kHz)", ylabel="amplitude of v(out) (dB V)", ylim=(-80, 20), xticks=range(1, 21, 2))
    left.legend(fontsize=7)
    right.legend(title="total harmonic distortion", fontsize=8)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
