"""A black box that is an MPI job, started by a rank of an MPI job under Slurm: srun and mpirun within mpirun and srun."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from mpi_launch import MPIRUN, assert_same, bits, column, sets

from dzhpc.job import process

SUM = """
import sys
from mpi4py import MPI
print("sum", MPI.COMM_WORLD.allreduce((MPI.COMM_WORLD.rank + 1) * float(sys.argv[1])), MPI.COMM_WORLD.size, flush=True)
"""
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"{sys.argv[1]}/pid.{os.environ['DZHPC_RANK']}.{os.environ['SLURM_PROCID']}", "w").write(str(os.getpid()))
time.sleep(600)
"""
INPUT = """
[task]
kind = "objective"
initial = { theta = 2.0 }
template = ["sum.py", "stubborn.py", "solver.sh"]
pattern = 'sum (\\S+) 2$'
retries = 0
[zo]
mu = 1e-3
[sparsity]
ratio = 0.0
[optim]
lr = 0.02
warmup_epochs = 0
[stop]
epochs = 1
"""
# Slurm may list a killed step for some seconds.
ENDED = """
for k in $(seq 30); do
    squeue -h -s -o %i > steps
    if [ "$(cat steps)" = "$SLURM_JOB_ID.batch" ]; then break; fi
    sleep 1
done
"""


@pytest.mark.long
def test_an_mpi_program_within_a_rank_is_a_step_of_its_own(cluster, clone):
    """Whatever starts the ranks and the program; a step for which there is no room, or that hangs, ends by task.timeout."""
    loads = ["srun", "--mpi=pmix", "true"]
    there = subprocess.run(loads, env=cluster.env, capture_output=True, text=True, timeout=60, check=False)
    if "can not load PMIx library" in there.stderr:
        reason = "Slurm's pmix plug-in finds no libpmix.so; apt-get install libpmix-dev"
        (pytest.fail if os.environ.get("DZHPC_SLURM") == "required" else pytest.skip)(reason)
    srun, solver = ["srun", "--mpi=pmix", "-n", "2"], [sys.executable, "sum.py", "{theta}"]
    step = [srun[0], "--overlap", *srun[1:]]
    for name, text in {"sum.py": SUM, "stubborn.py": STUBBORN, "program.toml": INPUT}.items():
        (clone / name).write_text(text)
    (clone / "solver.sh").write_text(shlex.join([*step, sys.executable, "sum.py"]) + " $1\n")
    runs = {
        "mpirun-srun": ([MPIRUN, "-n", "2"], sets(task__command=[*step, *solver])),
        "srun-script": (srun, sets(task__command=["sh", "solver.sh", "{theta}"])),
        "srun-mpirun": (srun, sets(task__command=[MPIRUN, "-n", "2", *solver])),
        "no-room": (srun, sets(task__command=[*srun, *solver], task__timeout=2)),
        "stubborn": (srun, sets(task__command=[*step, sys.executable, "stubborn.py", str(clone), "{theta}"], task__timeout=4)),
    }
    lines = ["#!/bin/bash", "#SBATCH --ntasks=2"]
    for name, (launcher, words) in runs.items():
        train = [*launcher, sys.executable, "-m", "dzhpc.train", "program.toml", "--run-dir", name, *words]
        lines.append(f"{shlex.join(train)} > {name}.out 2> {name}.err; echo $? > {name}.code")
    (clone / "programs.sh").write_text("\n".join([*lines, ENDED]))
    job = cluster.submit("programs.sh", cwd=clone)
    assert cluster.end_of(job, 300)["JobState"] == "COMPLETED"

    err = {name: (clone / f"{name}.err").read_text() for name in runs}
    assert {name: (clone / f"{name}.code").read_text() for name in runs} == {
        "mpirun-srun": "0\n", "srun-script": "0\n", "srun-mpirun": "0\n", "no-room": "6\n", "stubborn": "6\n"
    }, err  # fmt: skip
    assert column(clone / "mpirun-srun", "train/loss") == [6.0]
    for name in ("srun-script", "srun-mpirun"):
        assert_same(bits(clone / "mpirun-srun", but=("config",)), bits(clone / name, but=("config",)))
    assert "task.command = srun: had not ended after 2 s (task.timeout), and was killed" in err["no-room"]
    assert "task.command = srun: had not ended after 4 s (task.timeout), and was killed" in err["stubborn"]
    pids = [int(path.read_text()) for path in Path(clone).glob("pid.*")]
    assert len(pids) >= 2 and not any(process.start_of(pid) for pid in pids)
    assert (clone / "steps").read_text().split() == [f"{job}.batch"]
