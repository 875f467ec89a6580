"""Shared fixtures. Data that are not in the repository lie below $DZHPC_DATA, else ../shared/data; without them tests skip."""

import ast
import functools
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


@functools.cache
def group(path: str) -> str:
    """What shares processes, so that one worker of pytest-xdist makes them once: Slurm; and the MPI jobs that run batches,
    twice, for modules that start other processes beside them and mostly wait, and for those that do not. Else a file.
    """
    folder = Path(path).parent.name
    if folder != "mpi":
        return folder if folder == "slurm" else path
    nodes = ast.walk(ast.parse((PROJECT / path).read_text()))
    used = {
        alias.name for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "mpi_launch" for alias in node.names
    }
    return "launches" if LAUNCHERS & used else "batches"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests go to workers by their group."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid.split("::")[0])

    return Groups(config, log) if config.getvalue("dist") == "loadscope" else None


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
