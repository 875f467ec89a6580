"""Shared fixtures. Data that are not in the repository lie below $DZHPC_DATA, else ../shared/data; without them tests skip."""

import logging
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from dzhpc.config import paths

torch.set_num_threads(1)
settings.register_profile("dzhpc", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("dzhpc")

PROJECT = Path(__file__).resolve().parents[1]
LAUNCHERS = {"MPIRUN", "launched", "mpirun", "run"}  # of mpi_launch: what starts processes for one test


@pytest.hookimpl(tryfirst=True)  # xdist then reads the groups
def pytest_collection_modifyitems(items):
    """For ``--dist loadgroup``: what tests of one process share is made once. Slurm is one group, the MPI jobs that run
    batches are two: modules that start processes beside them, which mostly wait, and those that do not. Other files are alone.
    """
    for item in items:
        group = item.path.parent.name
        if group == "mpi":
            group = "launches" if LAUNCHERS & vars(item.module).keys() else "batches"
        item.add_marker(pytest.mark.xdist_group(group if group != "unit" else item.path.stem))


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_left_of_a_verb():
    """A verb called in this process says where it was started and takes the log for itself; the next test must not see it."""
    yield
    paths._started = None
    logging.getLogger("dzhpc").propagate = True


@pytest.fixture(scope="session")
def project():
    return PROJECT


@pytest.fixture(scope="session")
def data_root():
    """The folder that holds cifar10/ and weights/."""
    root = Path(os.environ.get("DZHPC_DATA") or PROJECT.parent / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"real data: {root} does not exist; set DZHPC_DATA")
    return root


@pytest.fixture(scope="session")
def cifar10_folder(data_root):
    """The folder that holds cifar-10-batches-py."""
    if not (data_root / "cifar10" / "cifar-10-batches-py" / "test_batch").exists():
        pytest.skip(f"CIFAR-10: no cifar10/cifar-10-batches-py in {data_root}; set DZHPC_DATA")
    return data_root / "cifar10"


@pytest.fixture(scope="session")
def cifar10(cifar10_folder):
    """CIFAR-10 as the program sees it."""
    from dzhpc.data.images import cifar10_from

    return cifar10_from(cifar10_folder, "")
