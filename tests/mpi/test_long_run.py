"""Many steps: memory does not grow with their number. Their time: benchmarks/long_run.py, which runs more of them."""

import sys

import pytest
from mpi_launch import MPIRUN


@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_steps(project, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(project / "benchmarks")
    import long_run

    run = long_run.measure([MPIRUN, "-n", "2", sys.executable], tmp_path, steps=600)
    assert run.steps == 600
    assert run.memory(0.9, 1.0) / run.memory(0.1, 0.25) < 1.015  # 10 kB a step
