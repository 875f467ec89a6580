"""The verb evaluate: the same table on one rank and on three; what it cannot evaluate is said in one line."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi_launch import Case, batch, mpirun
from PIL import Image

from dzhpc import config
from dzhpc.files.checkpoint import State
from dzhpc.files.runfolder import RunFolder
from dzhpc.tasks.sol import reference

MODULE = """
import os, time
from pathlib import Path
import torch

def step(states, parameters):
    if "SLOW" in os.environ:
        (Path(__file__).parent / f"at.{os.environ['OMPI_COMM_WORLD_RANK']}").write_text(str(os.getpid()))
        time.sleep(0.03)
    return states * (1 - parameters[:, None]).astype("float32")

def together(states, parameters):
    return states - states.mean(0)

class Gain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.gain * x[:, :-1]
"""
INPUT = """
[task]
kind = "sol"
simulator = "shrinking:step"
[model]
name = "shrinking:Gain"
[data]
name = "decay"
root = "."
"""
FRAMES, X = 30, 5


def decaying(rates: list[float]) -> tuple[np.ndarray, list[float]]:
    """States that lose half of ``rates`` a step, where the coarse solver takes away all of it."""
    start = np.random.default_rng(0).uniform(1, 2, (len(rates), 1, X))
    return start * (1 - np.array(rates)[:, None, None] / 2) ** np.arange(FRAMES)[:, None], rates


def save_run(place: Path, name: str, gains: list[float], text: str, seed: int = 0) -> None:
    """A run folder with a checkpoint for each gain."""
    settings = config.load(place / text, [f"run.seed={seed}"])
    folder = RunFolder(place / name)
    folder.create()
    for k, gain in enumerate(gains, 1):
        state = State(
            config=settings.to_toml(), history=[], step=10 * k, epoch=0.0, queries=0, wall_time_s=0.0, run_uuid="", seed=seed,
            model_sha256="", params={"gain": torch.tensor([gain])}, buffers={}, optimizer={}, coordinates=np.zeros(0), lpr=None,
        )  # fmt: skip
        folder.save(state, keep=99)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A user's solver and network, a reference, and run folders: two seeds, one that blows up, one of another task."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "shrinking.py").write_text(MODULE)
    (folder / "sol.toml").write_text(INPUT)
    (folder / "company.toml").write_text(INPUT.replace(":step", ":together"))
    (folder / "elsewhere").mkdir()
    (folder / "wild.toml").write_text(INPUT + "[optim]\nlr = 0.5\n")
    (folder / "other.toml").write_text('[task]\nkind = "objective"\nfunction = "shrinking:step"\n')
    splits = {"train": decaying([0.02, 0.08]), "valid": decaying([0.05]), "test": decaying([0.04, 0.06, 0.07])}
    reference.save(folder / "decay.h5", splits, {"staggered": False})
    save_run(folder, "net", [0.0, 0.02, 0.06], "sol.toml")
    save_run(folder, "net-1", [0.0, 0.03], "sol.toml", seed=1)
    save_run(folder, "wild", [1.5], "wild.toml")
    save_run(folder, "other", [0.0], "other.toml")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def done(place):
    """Results by name: the table on one rank and on three; errors on three."""
    every = ["net", "net-1", "wild", "--no-gif", "--steps", "10,30", "-o"]
    found = batch(1, place, [Case("one", "evaluate", [*every, "one"])])
    cases = {
        "three": [*every, "three"], "input": ["sol.toml", "--no-gif", "-o", "input"], "other": ["net", "other", "-o", "none"],
        "empty": ["empty", "-o", "none"], "gone": ["gone", "-o", "none"], "text": ["net", "--steps", "ten", "-o", "none"],
        "far": ["net", "--steps", "31", "-o", "none"], "nowhere": ["net", "--data-root", "empty", "-o", "none"],
        "company": ["company.toml", "-o", "none"],
    }  # fmt: skip
    drawn = Case("drawn", "evaluate", ["net", "wild", "-o", "drawn"], {"DRAW": "1"})
    return found | batch(3, place, [*(Case(name, "evaluate", args) for name, args in cases.items()), drawn])


def rows(place: Path, folder: str) -> list[list[str]]:
    return [line.split("\t") for line in (place / folder / "evaluation.tsv").read_text().splitlines()[1:]]


def test_one_rank_and_three_write_the_same_table(place, done):
    one, three = (done[name].succeeded().out for name in ("one", "three"))
    for name in ("evaluation.tsv", "evaluation.md"):
        assert (place / "one" / name).read_bytes() == (place / "three" / name).read_bytes()
    assert one.replace("one/", "three/") == three
    assert len(rows(place, "three")) == 4 * 3 * 2  # SRC and three runs, three simulations, two horizons


def test_the_numbers_are_those_of_the_solver_by_hand(place, done):
    """A step of SRC: 1 - r; of a net with gain g: (1 - r)(1 + g); reference: 1 - r / 2. r = 0.05, valid, wants g = 0.026."""
    done["three"].succeeded()
    starts, k = decaying([0.04, 0.06, 0.07])[0][:, 0].mean(1), np.arange(1, FRAMES)
    for about, gain in ((["SRC", "", "", ""], 0.0), (["net", "net", "0", "20"], 0.02), (["net", "net-1", "1", "20"], 0.03)):
        found = [float(r[6]) for r in rows(place, "three") if r[:4] == about and r[5] == "30"]
        rates = np.array([0.04, 0.06, 0.07])[:, None]
        expected = starts * np.abs(((1 - rates) * (1 + gain)) ** k - (1 - rates / 2) ** k).mean(1)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    wild = [r for r in rows(place, "three") if r[0] == "wild"]
    assert {r[6] for r in wild} == {"inf"} and all(1 <= int(r[7]) <= 3 for r in wild)
    assert "| wild | 0 | step 10 | diverged at step" in (place / "three" / "evaluation.md").read_text()
    assert "| net | 2 |" in done["three"].out and "| wild | 1 | diverged (0 of 3) |" in done["three"].out


def test_an_input_file_gives_the_solver_alone(place, done):
    assert "| SRC |" in done["input"].succeeded().out
    alone = [r[4:] for r in rows(place, "input")]
    assert alone == [r[4:] for r in rows(place, "three") if r[0] == "SRC" and r[5] == "30"]


def test_what_cannot_be_evaluated_is_said_in_one_line(done):
    done["other"].error(2, 'other: task.kind = "objective", expected "sol"')
    done["empty"].error(3, "empty: holds no checkpoint; give run folders")
    done["gone"].error(3, "gone: cannot be read")
    done["text"].error(2, "--steps ten: expected numbers such as 100,500")
    done["far"].error(2, "--steps 31: expected 1 to 30, the frames of the reference")
    done["company"].error(2, "task.simulator = shrinking:together: answers change", "with what else is in the call")
    done["nowhere"].error(2, "empty/decay.h5: no such file; make it with `python -m dzhpc.simulate INPUT -o empty/decay.h5`")


def test_a_run_knows_where_its_modules_lie_and_two_of_one_name_are_refused(place):
    for name, module in (("run-a", MODULE), ("run-b", MODULE.replace("self.gain *", "2 * self.gain *"))):
        save_run(place, name, [0.02], "sol.toml")
        (folder := place / f"home-{name}").mkdir()
        (folder / "shrinking.py").write_text(module)
        RunFolder(place / name).write_manifest({"modules": [str(folder)]})
    each = ["--data-root", "..", "--no-gif", "--steps", "5", "-o", "out"]
    cases = [Case("both", "evaluate", ["../run-a", "../run-b", *each]), Case("one", "evaluate", ["../run-b", *each])]
    found = batch(1, place / "elsewhere", cases)
    found["both"].error(2, "are two modules of one name")
    assert "| run-b | 1 |" in found["one"].succeeded().out


def test_figures_are_drawn(place, done):
    said = done["drawn"].succeeded().out
    assert "written: drawn/evaluation.md, drawn/evaluation.tsv, drawn/errors.png, drawn/states.png, drawn/states.gif" in said
    for name in ("errors.png", "states.png"):
        assert (place / "drawn" / name).stat().st_size > 10_000
        assert f"]({name})" in (place / "drawn" / "evaluation.md").read_text()
    with Image.open(place / "drawn" / "states.gif") as gif:
        assert gif.n_frames == FRAMES


def test_a_signal_ends_it_and_nothing_is_written(place):
    """To one rank only; the others leave before their next simulation."""

    def meanwhile(process) -> None:
        end, at = time.monotonic() + 60, place / "at.1"
        while not (at.exists() and at.read_text()):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.02)
        os.kill(int(at.read_text()), signal.SIGUSR1)

    env = os.environ | {"SLOW": "1"}
    result = mpirun(2, "evaluate", "net", "net-1", "--no-gif", "-o", "stopped", cwd=place, env=env, meanwhile=meanwhile)
    result.said_once(75, "stopped: signal received; nothing is kept, the same command begins again")
    assert not (place / "stopped").exists()
