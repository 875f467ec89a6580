"""The cluster, and a clone of the project to submit from. DZHPC_SLURM=required (CI): without Slurm the tests fail, not skip."""

import os
import shutil
import sys
from pathlib import Path

import one_node
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "mpi"))  # mpi_launch, userland


@pytest.fixture(scope="session")
def cluster():
    """A running one-node Slurm."""
    if lacking := one_node.missing():
        reason = f"Slurm: {', '.join(lacking)} not installed; {one_node.DEBIAN}"
        (pytest.fail if os.environ.get("DZHPC_SLURM") == "required" else pytest.skip)(reason)
    with one_node.one_node() as running:
        running.env |= {
            "OMP_NUM_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1",  # Slurm believes in more cores than there are
            "OMPI_MCA_btl": "self,sm", "OMPI_MCA_pml": "ob1",
        }  # fmt: skip
        running.env.pop("DZHPC_DATA", None)  # what jobs write into data/ stays in the clone
        yield running


@pytest.fixture(scope="module")
def clone(tmp_path_factory, project) -> Path:
    """What a user has after `git clone` and `make venv`: the program, the inputs, the job scripts, .venv. No data."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("dzhpc", "inputs", "slurm"):
        shutil.copytree(project / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv").symlink_to(Path(sys.prefix))
    shutil.copy(project / "tests" / "mpi" / "userland.py", folder)
    return folder
