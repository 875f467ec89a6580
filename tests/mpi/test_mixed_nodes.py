"""Two ranks that would compute other bits: refused with host and difference, or let in with a warning; known to a restart."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from mpi_launch import MPIRUN, Result, attributes, checkpoints, run, sets

FEW = sets(stop__steps=2)
narrower = pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch has no narrower instructions")


def train(place: Path, name: str, *args: str, second: list[str]) -> Result:
    """Two ranks, the second with another environment (``env`` arguments)."""
    command = [sys.executable, "-m", "dzhpc.train", "digits.toml", "--run-dir", name, *FEW, *args]
    return run([MPIRUN, "-n", 1, *command, ":", "-n", 1, "env", *second, *command], place)


@narrower
def test_another_processor_is_refused(place):
    narrow = ["ATEN_CPU_CAPABILITY=default"]
    line = train(place, "refused", second=narrow).said_once(4, "rank 1 on host ", "instruction set = default", "run.mixed_nodes")
    assert "rank 0 on host " in line
    assert not (place / "refused").exists()


@narrower
def test_mixed_nodes_are_let_in_and_stay_replicas(place):
    mixed = sets(run__mixed_nodes=True, run__check_every=1)
    train(place, "let-in", *mixed, second=["ATEN_CPU_CAPABILITY=default"]).said_once(0, "bits may depend on the number of ranks")
    assert attributes(checkpoints(place / "let-in")[-1], "state")["step"] == 2


@narrower
def test_a_restart_on_another_processor_warns(place):
    command = [sys.executable, "-m", "dzhpc.train", "digits.toml", "--run-dir", "moved"]
    run([*command, *FEW], place).succeeded()
    known = attributes(checkpoints(place / "moved")[-1], "env")
    assert {"instruction set", "compiled", "kernels", "run.threads", "device", "torch", "data (SHA-256)"} == set(known)
    result = run(["env", "ATEN_CPU_CAPABILITY=default", *command, *sets(stop__steps=3)], place)
    result.error(0, f"instruction set was {known['instruction set']}, now default: bits may differ from an undisturbed run")


@pytest.mark.long
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler")
def test_a_rank_without_a_compiler_is_refused_unless_nodes_may_be_mixed(place):
    bare, delta = ["-u", "CXX", f"PATH={place / 'nowhere'}"], sets(zo__engine="delta", zo__compile="on")
    difference = ("rank 1 on host ", "compiled = False", "; rank 0 on host ", "compiled = True")
    train(place, "uncompiled", *delta, second=bare).said_once(4, *difference, "run.mixed_nodes")
    assert not (place / "uncompiled").exists()
    failing = place / "failing"
    failing.write_text("#!/bin/sh\necho 'error: no space left' >&2\nexit 1\n")
    failing.chmod(0o755)
    lacks = ("rank 1 on host ", "kernels = none", "; rank 0 on host ", "kernels = winograd", "run.mixed_nodes")
    train(place, "uncompiled", *delta, second=[f"CXX={failing}"]).said_once(4, *lacks)
    assert not (place / "uncompiled").exists()
    mixed = train(place, "mixed", *delta, *sets(run__mixed_nodes=True), second=bare)
    mixed.error(0, *difference, "bits may depend on the number of ranks")
    assert attributes(checkpoints(place / "mixed")[-1], "state")["step"] == 2
