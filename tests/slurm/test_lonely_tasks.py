"""A job of two tasks: a serial verb in its shell is one process among none; tasks of srun that MPI does not know are refused."""

SCRIPT = """#!/bin/bash
#SBATCH --ntasks=2
env | grep -E '^(SLURM|PMI)' > batch.env
.venv/bin/python -m dzhpc.info keys > keys.out 2> keys.err; echo $? > keys.code
srun --mpi=none .venv/bin/python -m dzhpc.train --run-dir none > step.out 2> step.err; echo $? > step.code
srun --mpi=none .venv/bin/python -m dzhpc.info > info.out 2> info.err; echo $? > info.code
"""


def test_a_serial_verb_works_and_lonely_tasks_are_refused(cluster, clone):
    (clone / "lonely.sh").write_text(SCRIPT)
    job = cluster.submit("lonely.sh", cwd=clone)
    assert cluster.end_of(job)["JobState"] == "COMPLETED"
    code, out, err = (
        {n: (clone / f"{n}.{kind}").read_text() for n in ("keys", "step", "info")} for kind in ("code", "out", "err")
    )
    assert "SLURM_NTASKS=2\n" in (clone / "batch.env").read_text()
    assert (code["keys"], err["keys"]) == ("0\n", "") and "## [run]" in out["keys"]
    assert code["step"] == "4\n" and not (clone / "none").exists()
    refused = [line for line in err["step"].splitlines() if line.startswith("SLURM_STEP_NUM_TASKS = 2, but MPI sees 1 rank")]
    assert 1 <= len(refused) <= 2 and "mpirun -n 2" in refused[0]  # srun lets the second task speak, too
    assert code["info"] == "0\n" and out["info"].count("1 ranks, MPI: ") == 2
