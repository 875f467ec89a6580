"""The example in examples/: it recovers the oscillator's parameters, with the same bits on 1 and 2 ranks."""

import shutil

import numpy as np
import pytest
from mpi_launch import Case, assert_same, batch, bits, checkpoints

from dzhpc.config import import_object
from dzhpc.files.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def example(project, tmp_path_factory):
    """A folder with a copy of the example; run folders by rank count: ``1`` and ``2``."""
    folder = tmp_path_factory.mktemp("example")
    for name in ("own_loss.py", "own_loss.toml"):
        shutil.copy(project / "examples" / name, folder)
    for ranks in (1, 2):
        batch(ranks, folder, [Case("train", "train", ["own_loss.toml", "--run-dir", ranks, "--quiet"])])["train"].succeeded()
    return folder


def theta(run_folder):
    return load_checkpoint(checkpoints(run_folder)[-1]).params["theta"].numpy()


def test_recovers_the_true_parameters(example, monkeypatch):
    monkeypatch.syspath_prepend(str(example))
    true = import_object("own_loss:TRUE", "")
    standard_error = np.array([0.007, 0.003, 0.006, 0.013])  # of a least-squares fit at this noise
    assert np.all(np.abs(theta(example / "2") - true) < 3 * standard_error)


def test_is_the_least_squares_fit(example, monkeypatch):
    from scipy.optimize import least_squares

    monkeypatch.syspath_prepend(str(example))
    loss, record = import_object("own_loss:Oscillator", "")(), import_object("own_loss:record", "")
    fit = least_squares(lambda t: record(t) - loss.data, loss.initial())
    np.testing.assert_allclose(theta(example / "2"), fit.x, atol=2e-3)


def test_same_bits_on_one_and_two_ranks(example):
    assert_same(bits(example / "1"), bits(example / "2"))


def test_is_short(project):
    assert len((project / "examples" / "own_loss.py").read_text().splitlines()) <= 30
