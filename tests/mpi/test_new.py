"""`python -m dzhpc.new`: what it writes runs at once, of every kind, and so does its job script."""

import subprocess
import sys
from pathlib import Path

import pytest
from mpi_launch import Case, batch, checkpoints, column, run, sets

KINDS = ("objective", "classification", "defense", "sol", "command")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a problem of each kind, each run for two steps."""
    folder = tmp_path_factory.mktemp("new")
    (folder / "data").mkdir()
    cases = [Case(f"new-{kind}", "new", [f"my_{kind}", "--kind", kind]) for kind in KINDS]
    cases += [Case("again", "new", ["my_sol", "--kind", "sol"]), Case("digit", "new", ["2-fast"])]
    cases += [Case(name, "new", [name]) for name in ("dzhpc", "json", "class")]
    cases += [Case("simulate", "simulate", ["my_sol/my_sol.toml", "-o", "data/my_sol.h5"])]
    cases += [Case(kind, "train", [f"my_{kind}/my_{kind}.toml", *sets(stop__steps=2, data__root="data")]) for kind in KINDS]
    cases += [Case("certify", "certify", ["runs/my_defense", "--images", "2", "--n", "20", "--n0", "5"])]
    return folder, batch(1, folder, cases, timeout=120)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_problem_runs_at_once(written, kind):
    folder, results = written
    out = results[f"new-{kind}"].succeeded().out
    named = [name.strip() for name in out.splitlines()[0].removeprefix("written: ").split(",")]
    assert sorted(named) == sorted(str(path.relative_to(folder)) for path in (folder / f"my_{kind}").glob("*.*"))
    assert "NAME" not in "".join((folder / name).read_text() for name in named)
    results[kind].succeeded()
    assert len(column(folder / "runs" / f"my_{kind}", "train/loss")) == 2


def test_a_run_folder_knows_where_the_modules_of_its_input_lie(written):
    assert "written: runs/my_defense/certify/" in written[1]["certify"].succeeded().out


def test_what_is_there_already_is_left_alone(written):
    written[1]["again"].error(2, "my_sol: is there already")
    for name in ("dzhpc", "json", "class"):  # a folder dzhpc/ would hide this package
        written[1][name].error(2, f"{name}: is a word or a module of Python's")
        assert not (written[0] / name).exists()
    written[1]["digit"].error(2, "2-fast: expected a name that Python can import")


def test_the_job_script_runs_without_slurm(written, monkeypatch):
    folder, _ = written
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    for kind in KINDS:
        subprocess.run(["sh", "-n", f"my_{kind}/job.sh"], cwd=folder, check=True, timeout=10)
    assert run(["sh", "my_objective/job.sh"], folder).code == 0
    assert checkpoints(folder / "runs" / "my_objective")[-1].name == "step-00000100.h5"
