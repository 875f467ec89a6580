"""Where MPI cannot start: one process needs none, a launcher's processes end with one line. Launchers that MPI does not know."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import pytest
from mpi_launch import Case, Result, assert_same, batch, bits, mpirun, run, sets
from PIL import Image

from dzhpc.job import process

BROKEN = 'raise RuntimeError("cannot load MPI library; libmpi.so: no such file")\n'
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}  # as a batch shell has it in a job of two tasks
FEW = sets(stop__steps=2)


def environment(**more: str) -> dict[str, str]:
    """This one without any launcher's variables."""
    launchers = (*process.SIZE_VARIABLES, *process.RANK_VARIABLES, process.STEP_SIZE, "SLURM_PROCID", "SLURM_NTASKS")
    return {key: value for key, value in os.environ.items() if key not in launchers} | more


@pytest.fixture(scope="module")
def broken(place) -> str:
    """PYTHONPATH with an mpi4py that raises on import before all others."""
    (place / "broken" / "mpi4py").mkdir(parents=True)
    (place / "broken" / "mpi4py" / "__init__.py").write_text(BROKEN)
    return os.pathsep.join(filter(None, (str(place / "broken"), os.environ.get("PYTHONPATH"))))


@pytest.fixture(scope="module")
def alone(place, broken) -> dict[str, Result]:
    """Command lines of one process without MPI, one after another: results by name."""
    for split in ("train", "val"):
        for label in ("red", "blue"):
            (place / "flags" / split / label).mkdir(parents=True)
            Image.new("RGB", (6, 6), label).save(place / "flags" / split / label / "0.png")
    gradient = ["gradient", "--model", "cnn:2", "--batch", 2, "--coords", 3, "--reference", 3, "--repeats", 1]
    cases = [
        Case("train", "train", ["digits.toml", "--run-dir", "alone", *FEW]),
        Case("fetch", "fetch", ["flags", "--from", "flags", "--size", 6, "--root", "packed"]),
        Case("report", "report", ["alone", "-o", "drawn"]), Case("info", "info", []),
        Case("bench", "bench", [*gradient, "--engines", "full,reuse"]),
        Case("keys", "info", ["keys"], SLURM), Case("campaign", "report", ["--campaign", "alone", "-o", "all"], SLURM),
        Case("in-a-job", "train", ["digits.toml", "--run-dir", "in-a-job", *FEW], SLURM),
        Case("help", "train", ["--help"], SLURM),
    ]  # fmt: skip
    files = place / "without"
    files.mkdir()
    table = [{**dataclasses.asdict(case), "args": [str(arg) for arg in case.args]} for case in cases]
    (files / "0.json").write_text(json.dumps({"cwd": str(place), "files": str(files), "cases": table}))
    command = [sys.executable, Path(__file__).with_name("several.py"), files, os.getpid()]

    def end_after_the_last(process) -> None:
        while process.poll() is None and not (files / f"{cases[-1].name}.code.0").exists():
            time.sleep(0.1)
        (files / "end").touch()

    run(command, place, timeout=240, env=environment(PYTHONPATH=broken), meanwhile=end_after_the_last).succeeded()
    read = lambda name, kind: (files / f"{name}.{kind}.0").read_text()  # noqa: E731
    return {c.name: Result(json.loads(read(c.name, "code")), read(c.name, "out"), read(c.name, "err"), 0.0) for c in cases}


def test_a_run_of_one_process_has_the_bits_of_any_other(place, alone):
    assert alone["train"].succeeded().out.startswith("starting afresh in alone\n")
    batch(2, place, [Case("two", "train", ["digits.toml", "--run-dir", "two", *FEW])])["two"].succeeded()
    assert_same(bits(place / "alone"), bits(place / "two"))


def test_serial_verbs(place, alone):
    counts = "".join(f"flags/{part}: 2 images, 2 classes\n" for part in ("train", "val"))
    assert alone["fetch"].succeeded().out == f"{counts}written: packed/flags.h5\n"
    assert "| alone | 2 |" in alone["report"].succeeded().out and (place / "drawn" / "curves.png").exists()
    assert alone["info"].succeeded().out.startswith("1 ranks, MPI: none (one process without a launcher), Python ")
    assert alone["bench"].code == 0
    first = [row.split(" | ")[0] for row in alone["bench"].out.splitlines() if row.startswith("| ")]
    assert first[1:3] == ["| full", "| reuse"]


def test_in_a_job_of_several_tasks_but_not_started_by_srun(place, alone):
    """SLURM_NTASKS is the allocation's. A run of one process there may be a mistake, which is said."""
    assert "## [run]" in alone["keys"].succeeded().out
    assert "alone" in alone["campaign"].succeeded().out
    assert alone["help"].succeeded().out.startswith("usage: dzhpc.train")
    alone["in-a-job"].error(0, "SLURM_NTASKS = 2, but this is one process; start with mpirun to use them all")
    assert_same(bits(place / "alone"), bits(place / "in-a-job"))


def test_under_mpirun_a_broken_mpi4py_is_one_line(place, broken):
    result = mpirun(2, "train", "digits.toml", "--run-dir", "none", cwd=place, env=environment(PYTHONPATH=broken))
    result.said_once(4, "MPI cannot be loaded (RuntimeError: cannot load MPI library", "INSTALL.md")
    assert not (place / "none").exists()


def test_the_launcher_of_another_mpi(place):
    """What MPICH's mpiexec tells its ranks; with Open MPI, which may have words of its own for it, each would be alone."""
    command = [sys.executable, "-m", "dzhpc.train", "digits.toml", "--run-dir", "none"]
    result = run(command, place, env=environment(PMI_SIZE="2", PMI_RANK="0"))
    result.said_once(4, "PMI_SIZE = 2, but MPI sees 1 rank: mpi4py was built against another MPI", "INSTALL.md")
    assert not (place / "none").exists()
