"""Launching and leaving: exit codes, one line for each error, lonely ranks, and a rank without MPI."""

import json

import numpy as np
import pytest

from dzhpc import errors
from dzhpc.errors import exit_code_of, message_of
from dzhpc.job import process
from dzhpc.job.failure import RankError
from dzhpc.job.launch import check_launch
from dzhpc.job.stopping import Reason
from dzhpc.job.world import World


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    slurm = ("SLURM_NTASKS", "SLURM_PROCID", process.STEP_SIZE)
    for name in (*slurm, *process.SIZE_VARIABLES, *process.RANK_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def test_tasks_of_srun_that_do_not_know_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(errors.LaunchError, match=r"SLURM_STEP_NUM_TASKS = 4, but MPI sees 1 rank.*mpirun -n 4 .*srun --mpi=pmix"):
        check_launch(1)


@pytest.mark.parametrize("variable", process.SIZE_VARIABLES)
def test_the_launcher_of_another_mpi_is_refused(monkeypatch, variable):
    monkeypatch.setenv(variable, "2")
    with pytest.raises(errors.LaunchError, match=rf"{variable} = 2, but MPI sees 1 rank: mpi4py was built.*INSTALL"):
        check_launch(1)


@pytest.mark.parametrize("variable", ["PALS_RANKID", "ALPS_APP_PE", "FLUX_TASK_RANK", "PMIX_RANK"])
def test_so_is_one_that_says_a_rank_and_no_size(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(errors.LaunchError, match=rf"{variable} = 1, but MPI sees 1 rank: mpi4py was built.*INSTALL"):
        check_launch(1)
    assert check_launch(2) is None


@pytest.mark.parametrize(
    ("size", "environment"),
    [
        (1, {}),
        (1, {"PALS_RANKID": "0"}),
        (1, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}),  # a batch shell in an allocation of several tasks
        (1, {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}),  # an interactive step
        (4, {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}),
        (4, {"PMI_SIZE": "4"}),
        (1, {"SLURM_STEP_NUM_TASKS": "4", "OMPI_COMM_WORLD_SIZE": "1"}),  # mpirun -n 1 by a daemon that srun started
    ],
)
def test_a_lone_process_and_a_whole_job_may_start(monkeypatch, size, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert check_launch(size) is None


@pytest.mark.parametrize(
    ("launched", "rank", "environment"),
    [
        (False, 0, {}),
        (False, 0, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "PMIX_MCA_gds": "hash"}),
        (True, 3, {"PMIX_RANK": "3"}),  # srun --mpi=pmix says no size
        (True, 2, {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}),
        (True, 1, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}),
    ],
)
def test_what_started_this_process(monkeypatch, launched, rank, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (process.launched(), process.launch_rank()) == (launched, rank)


def test_a_rank_alone_gets_what_it_gives():
    world = World()
    assert (world.rank, world.size, world.local_rank, world.local_size, world.is_root) == (0, 1, 0, 1, True)
    assert [world.bcast(3), world.scatter_numbers([np.array([4, 7])]).tolist(), world.maximum(5)] == [3, [4, 7], 5]
    assert world.gather(6) == world.allgather(6) == [6]
    negative_zero = world.join(np.array([-0.0, -1.5, np.nan]))
    assert not np.signbit(negative_zero[0]) and negative_zero[1] == -1.5 and np.isnan(negative_zero[2])
    assert world.split(3, lambda mine: 2 * np.array(mine)).tolist() == [0, 2, 4]
    with pytest.raises(RankError, match=r"^no such thing$") as caught, world.together():
        raise errors.InputError("no such thing")
    assert caught.value.exit_code == 2


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


def test_ctrl_c_and_files_that_the_system_refuses_are_no_faults_of_the_program(tmp_path):
    try:
        (tmp_path / ("n" * 300)).stat()
    except OSError as error:
        assert (exit_code_of(error), ": cannot be used (File name too long), at " in message_of(error)) == (2, True)
    assert (exit_code_of(KeyboardInterrupt()), message_of(KeyboardInterrupt())) == (130, "interrupted by the keyboard (Ctrl-C)")


def test_an_error_whose_text_fails_or_is_long_is_one_line_all_the_same():
    class Mute(Exception):
        def __str__(self):
            raise ValueError("no text")

    assert (message_of(Mute()), exit_code_of(Mute()), message_of(StopIteration())) == ("Mute", 1, "StopIteration")
    assert len(message_of(ValueError("x" * 5000))) < 1100


def test_the_place_of_an_error_is_the_users_line():
    try:
        json.loads("{")
    except ValueError as error:
        assert "test_launch.py:" in message_of(error) and message_of(error).endswith("_is_the_users_line")
