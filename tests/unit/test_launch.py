"""Launching and leaving: exit codes, one line for each error, and Slurm's lonely ranks."""

import pytest

from dzhpc import errors
from dzhpc.errors import exit_code_of, message_of
from dzhpc.job.process import SIZE_VARIABLES
from dzhpc.job.stopping import Reason
from dzhpc.job.world import check_launch


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in ("SLURM_NTASKS", *SIZE_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def test_tasks_of_slurm_that_do_not_know_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(errors.LaunchError, match=r"SLURM_NTASKS = 4, but MPI sees 1 rank.*mpirun -n 4 .*srun --mpi=pmix"):
        check_launch(1)


@pytest.mark.parametrize(("tasks", "size", "variable"), [(None, 1, None), ("1", 1, None), ("4", 4, None), ("4", 1, "PMIX_SIZE")])
def test_a_lone_process_and_a_whole_job_may_start(monkeypatch, tasks, size, variable):
    for name, value in (("SLURM_NTASKS", tasks), (variable, "1")):
        if name and value:
            monkeypatch.setenv(name, value)
    assert check_launch(size) is None


def test_exit_codes_are_the_documented_ones():
    kinds = (
        ValueError,
        errors.InputError,
        errors.CheckpointError,
        errors.LaunchError,
        errors.NumericalError,
        errors.ReplicaError,
        errors.BlackBoxError,
    )
    assert [exit_code_of(kind("x")) for kind in kinds] == [1, 2, 3, 4, 5, 5, 6]
    assert {r.name for r in Reason if r.exit_code == 75} == {"WALLTIME", "DEADLINE", "SIGNAL", "TERMINATED"}
    assert {r.exit_code for r in Reason} == {0, 75}


def test_an_error_nobody_foresaw_is_one_line_with_its_place():
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        message = message_of(error)
    assert message.startswith("ValueError: two lines, at ")
    assert message.endswith("in test_an_error_nobody_foresaw_is_one_line_with_its_place")
    assert message_of(errors.InputError("a.toml: wrong")) == "a.toml: wrong"
