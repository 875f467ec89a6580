"""A folder with the user's module and input files, for one test module; and the end of the MPI jobs that the modules share.

Engine `reuse` starts fastest: nothing is compiled.
"""

import shutil
from pathlib import Path

import pytest
from mpi_launch import Job

DIGITS = """
[model]
name = "cnn"
depth = 2
width = 4
[data]
name = "digits"
batch_size = 48
train_limit = 336
[zo]
engine = "reuse"
mu = 1e-3
[sparsity]
ratio = 0.5
redraw_steps = 3
q = 6
[optim]
lr = 0.05
warmup_epochs = 0.5
[eval]
batch_size = 100
[stop]
epochs = 4
steps = 8
[checkpoint]
every_steps = 2
"""
OWN = """
[model]
name = "userland:Net"
[data]
name = "userland:stripes"
batch_size = 14
train_limit = 98
[zo]
engine = "reuse"
mu = 1e-3
[sparsity]
ratio = 0.5
redraw_steps = 3
q = 6
[optim]
lr = 0.05
[stop]
epochs = 4
steps = 8
[checkpoint]
every_steps = 2
"""
OBJECTIVE = """
[task]
kind = "objective"
function = "userland:Bowl"
[zo]
mu = 1e-6
[sparsity]
ratio = 0.0
[optim]
lr = 0.02
momentum = 0.5
weight_decay = 0.0
warmup_epochs = 0
schedule = "constant"
[stop]
epochs = 60
[checkpoint]
every_steps = 5
"""


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
