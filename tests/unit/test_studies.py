"""Studies: every member of both sizes is an input that the program takes, and the array of the job has a task for each."""

import os
import re
import subprocess

import pytest

from dzhpc import config

STUDIES = ("fig2", "fig4", "fig5", "table1", "a2", "a3", "a5", "open")


def listed(project, study, size):
    command = ["bash", f"slurm/studies/{study}.sh", "list"]
    done = subprocess.run(command, cwd=project, env={**os.environ, "SIZE": size}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split() for line in done.stdout.splitlines()]


def test_the_studies_are_those_that_are_there(project):
    assert {path.stem for path in (project / "slurm" / "studies").glob("*.sh")} == {"study", *STUDIES}


@pytest.mark.parametrize("study", STUDIES)
def test_members_are_valid_inputs_with_names_of_their_own(project, study):
    for size in ("paper", "small"):
        members = listed(project, study, size)
        assert len({name for _, name, *_ in members}) == len(members) > 3
        for source, name, *keys in members:
            assert config.load(project / source, [*keys, f"run.name={name}"]).run.name == name
        if size == "paper":
            last = re.search(r"--array=0-(\d+)", (project / "slurm" / "studies" / f"{study}.sh").read_text())[1]
            assert int(last) == len(members) - 1


def test_pattern_search_asks_as_often_as_the_run_beside_it(project):
    """28,220 moves and a base, as DeepZero at 90 % has coordinates; an even number as near as can be in the smaller size."""
    for size, moves in (("paper", "28220"), ("small", "4068")):
        keys = {name: dict(key.split("=") for key in keys) for _, name, *keys in listed(project, "fig5", size)}
        for name, own in keys.items():
            beside = keys[name.replace("pattern", "deepzero")]
            assert own["data.batch_size"] == beside["data.batch_size"] and own["stop.epochs"] == beside["stop.epochs"]
            assert own.get("zo.q", moves) == moves
