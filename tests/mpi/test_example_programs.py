"""The examples with real programs: ngspice (an amplifier) and ccx (a plate), over ranks. They skip where a program is missing."""

import os
import shutil

import numpy as np
import pytest
from mpi_launch import Case, assert_same, batch, bits, column, sets

from dzhpc.config import import_object


def example(project, tmp_path_factory, name: str, program: str, **keys):
    """A folder with a copy of the example, and its run on one and on two ranks."""
    if shutil.which(program) is None:
        what = f"{program} is not installed: apt install {'ngspice' if program == 'ngspice' else 'calculix-ccx'}"
        pytest.fail(what) if os.environ.get("DZHPC_PROGRAMS") == "required" else pytest.skip(what)
    folder = tmp_path_factory.mktemp(name)
    shutil.copytree(project / "examples" / name, folder / "examples" / name)
    for ranks in (1, 2):
        words = [f"examples/{name}/{name}.toml", "--run-dir", f"on-{ranks}", *sets(**keys)]
        batch(ranks, folder, [Case("train", "train", words)], timeout=120)["train"].succeeded()
    return folder


@pytest.fixture(scope="module")
def amplifier(project, tmp_path_factory):
    return example(project, tmp_path_factory, "amplifier", "ngspice", stop__steps=1)


@pytest.fixture(scope="module")
def plate(project, tmp_path_factory):
    return example(project, tmp_path_factory, "plate", "ccx", stop__steps=4)


def test_a_network_lowers_the_distortion_that_ngspice_sees(amplifier, monkeypatch):
    monkeypatch.syspath_prepend(amplifier / "examples" / "amplifier")
    module = import_object("amplifier:waveforms", "").__globals__
    _, given, before, out = module["waveforms"](module["initial"]())
    assert np.abs(before - given).max() < 1e-9 and abs(given.max() - 5) < 0.01  # nothing is pre-distorted yet
    assert abs(module["distortion"](out) + 20.6) < 0.2
    loss = np.mean((out - given)[:-1] ** 2)
    assert column(amplifier / "on-2", "train/loss")[0] == pytest.approx(loss, rel=0.01)
    assert column(amplifier / "on-2", "eval/loss")[-1] < 0.9 * loss
    assert column(amplifier / "on-2", "train/queries") == [98]


def test_moduli_come_nearer_to_what_ccx_was_told(plate):
    losses = column(plate / "on-2", "train/loss")
    assert losses[-1] < 1e-4 * losses[0]
    assert column(plate / "on-2", "train/queries") == [5, 10, 16, 21]


@pytest.mark.parametrize("name", ["amplifier", "plate"])
def test_the_same_bits_on_one_rank_and_two(request, name):
    folder = request.getfixturevalue(name)
    assert_same(bits(folder / "on-1"), bits(folder / "on-2"))


def test_moduli_that_no_material_has_are_infeasible(plate):
    moduli = ["--set", "task.initial={long = -1.0, across = 1.0, shear = 1.0}"]
    words = ["examples/plate/plate.toml", "--run-dir", "negative", *moduli]
    line = batch(1, plate, [Case("train", "train", words)], timeout=120)["train"].said_once(5, "the loss at theta is inf")
    assert "nothing was trained yet" in line
