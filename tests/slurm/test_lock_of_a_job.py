"""A lock that another host wrote: Slurm knows whether its job still runs."""

import json

import pytest

from dzhpc.errors import LaunchError
from dzhpc.job import lock, process


def test_only_a_running_job_keeps_its_run_folder(cluster, tmp_path, monkeypatch):
    script = tmp_path / "sleep.sh"
    script.write_text("#!/bin/sh\nsleep 60\n")
    running = cluster.submit(script, cwd=tmp_path)
    waiting = cluster.submit("--hold", script, cwd=tmp_path)
    cluster.when(running, lambda fields: fields["JobState"] == "RUNNING")
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def written(job: str) -> lock.Lock:
        owner = process.identity() | {"host": "elsewhere", "pid": 1, "job_id": job}
        (tmp_path / "lock.json").write_text(json.dumps(owner))
        return lock.Lock(tmp_path)

    with pytest.raises(LaunchError, match=rf"in use by process 1 on host elsewhere \(Slurm job {running}\)"):
        written(running).acquire()
    assert written(waiting).acquire().endswith(f"(Slurm job {waiting})")  # requeued, say: its earlier self has ended
    assert written("999999").acquire().endswith("(Slurm job 999999)")
    cluster.command("scancel", running, waiting)
    assert cluster.end_of(running)["JobState"] == "CANCELLED"
    assert written(running).acquire().endswith(f"(Slurm job {running})")
