"""The example with a user's solver in the loop: reference, training by queries, evaluation; the same bits on 1 and 2 ranks."""

import importlib
import shutil

import numpy as np
import pytest
from mpi_launch import Case, assert_same, batch, bits, column, contents, sets

from dzhpc.tasks.sol import reference

STEPS = 40  # of 260


@pytest.fixture(scope="module")
def example(project, tmp_path_factory):
    """A folder with a copy of the example; reference, run folder and evaluation by rank count: ``data-1``, ``run-1``, ..."""
    folder = tmp_path_factory.mktemp("burgers")
    for name in ("burgers.py", "burgers.toml"):
        shutil.copy(project / "examples" / "burgers" / name, folder)
    for ranks in (1, 2):
        data, run, out = (folder / f"{name}-{ranks}" for name in ("data", "run", "evaluation"))
        data.mkdir()
        cases = [
            Case("simulate", "simulate", ["burgers.toml", "-o", data / "burgers.h5"]),
            Case("train", "train", ["burgers.toml", "--run-dir", run, *sets(stop__steps=STEPS, data__root=str(data))]),
            Case("evaluate", "evaluate", ["burgers.toml", run, "-o", out, "--no-gif"]),
        ]
        for result in batch(ranks, folder, cases).values():
            result.succeeded()
    return folder


def errors(example, ranks):
    """The mean error of (SRC, the trained network) over the test simulations."""
    rows = [line.split("\t") for line in (example / f"evaluation-{ranks}" / "evaluation.tsv").read_text().splitlines()[1:]]
    return [np.mean([float(row[6]) for row in rows if (row[0] == "SRC") == alone]) for alone in (True, False)]


def test_queries_alone_make_the_coarse_solver_better(example):
    before, after = errors(example, 2)
    assert 0.036 < before < 0.038
    assert after < 0.8 * before
    losses = column(example / "run-2", "train/loss")
    assert len(losses) == STEPS and np.mean(losses[-10:]) < 0.5 * np.mean(losses[:3])


def test_the_same_bits_on_one_rank_and_two(example):
    assert_same(*(contents(example / f"data-{ranks}" / "burgers.h5") for ranks in (1, 2)))
    assert_same(*(bits(example / f"run-{ranks}", but=("config",)) for ranks in (1, 2)))
    assert errors(example, 1) == errors(example, 2)


def test_the_reference_keeps_the_mean_and_is_fine_enough(example, monkeypatch):
    """Burgers' equation on a ring keeps the mean of u; twice the points change the reference less than a fifth of SRC's error."""
    states = reference.load(example / "data-2" / "burgers.h5").test.states
    np.testing.assert_allclose(states.mean(2), 0, atol=1e-6)
    monkeypatch.syspath_prepend(str(example))
    module = importlib.import_module("burgers")
    monkeypatch.setattr(module, "FACTOR", 2 * module.FACTOR)
    assert np.abs(module.reference(0.006) - states[1].numpy()).mean() < 0.2 * errors(example, 2)[0]


def test_is_a_page(project):
    assert len((project / "examples" / "burgers" / "burgers.py").read_text().splitlines()) <= 40
