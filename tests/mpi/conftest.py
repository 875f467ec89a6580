"""A folder with the user's module and input files, for one test module; and the end of the MPI jobs that the modules share."""

import shutil
from pathlib import Path

import input_texts
import pytest
from input_texts import text
from mpi_launch import Job

DIGITS = text(input_texts.DIGITS, checkpoint={"every_steps": 2})
OWN = text(
    {name: input_texts.DIGITS[name] for name in ("zo", "sparsity", "stop")},
    model={"name": "userland:Net"}, data={"name": "userland:stripes", "batch_size": 14, "train_limit": 98},
    optim={"lr": 0.05}, checkpoint={"every_steps": 2},
)  # fmt: skip
OBJECTIVE = text(input_texts.OBJECTIVE, checkpoint={"every_steps": 5})


@pytest.fixture(scope="session", autouse=True)
def _jobs():
    yield
    Job.close_all()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with ``digits.toml``, ``own.toml``, ``objective.toml`` and ``userland.py``; the tests run in it."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "digits.toml").write_text(DIGITS)
    (folder / "own.toml").write_text(OWN)
    (folder / "objective.toml").write_text(OBJECTIVE)
    shutil.copy(Path(__file__).with_name("userland.py"), folder)
    return folder
