"""The state of a campaign, from run folders alone."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from dzhpc.errors import InputError
from dzhpc.files import campaign, curves
from dzhpc.files.metrics import Metrics
from dzhpc.job import process

GPU = {"rank": 0, "host": "a", "uuid": "GPU-1"}


def make(folder, steps, *launches):
    """A run folder with so many steps, an accuracy of 0.5 at the last, and launch manifests."""
    (folder / "launches").mkdir(parents=True)
    for number, launch in enumerate(launches, 1):
        (folder / "launches" / f"{number:03d}.json").write_text(json.dumps(launch))
    if steps:
        metrics = Metrics(folder / "metrics.h5")
        for step in range(1, steps + 1):
            metrics.add_train(step, step / 10, 2 / step, 0.1, 1.0, 100 * step, 36.0, 0.0, 0)
        metrics.add_eval(steps, steps / 10, 1.0, 0.5)
        metrics.flush()


@pytest.fixture
def runs(tmp_path):
    two_gpus = {"hosts": [GPU, GPU | {"uuid": "GPU-2"}]}
    make(
        tmp_path / "a",
        20,
        two_gpus | {"state": "finished", "seconds": 7200, "run_uuid": "set aside"},
        two_gpus | {"state": "stopped", "seconds": 3600},
        two_gpus | {"state": "finished", "reason": "all epochs done", "seconds": 1800},
    )
    make(
        tmp_path / "b" / "deep",
        7,
        {"state": "stopped", "reason": "signal received", "hosts": [GPU | {"count": 2}], "seconds": 7200},
    )
    make(tmp_path / "c", 0, {"state": "failed", "reason": "rank 1: the a|b\nsolver diverged", "hosts": [{"rank": 0, "uuid": ""}]})
    make(tmp_path / "d", 3, {"state": "running", "hosts": []})
    make(tmp_path / "e", 3, {"state": "running", "hosts": []})
    (tmp_path / "e" / "lock.json").write_text(json.dumps(process.identity() | {"job_id": "12"}))
    make(tmp_path / "f", 3, {"state": "finished", "reason": "stop.steps reached", "hosts": []})
    damaged = tmp_path / "f" / "metrics.h5"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    make(tmp_path / "g", 0)
    return tmp_path


def rows(text):
    return {c[0]: c[1:] for c in ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()) if len(c) == 8}


def test_every_state_reason_and_hour(runs, tmp_path):
    found = rows(curves.write_campaign(runs, tmp_path / "out")[0])
    assert found["a"] == ["finished", "all epochs done", "20", "2.00", "50.00 %", "3.00", "3.00"]
    assert found["b/deep"] == ["stopped", "signal received", "7", "0.70", "50.00 %", "2.00", "4.00"]  # two ranks on one GPU
    assert found["c"] == ["failed", "rank 1: the a/b solver diverged", "0", "0.00", "", "0.00", "0.00"]
    assert found["d"][:2] == ["failed", "ended without a word (killed?)"]
    assert found["e"][0] == "running" and found["e"][1].endswith("(Slurm job 12)")
    assert found["f"][0] == "finished" and "damaged" in found["f"][1]
    assert found["g"][:2] == ["failed", "never started"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "7 runs: 2 finished, 1 running, 1 stopped, 3 failed" in text
    assert Image.open(tmp_path / "out" / "curves.png").size[0] > 500


def test_the_verb_writes_into_the_folder(runs):
    command = [sys.executable, "-m", "dzhpc.report", "--campaign", str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(done.stdout)["a"][0] == "finished"
    assert (runs / "report").is_dir()  # and no run
    assert {str(run.relative_to(runs)) for run in campaign.find(runs)} == rows(done.stdout).keys() - {"run", "---"}


def test_folders_without_runs_are_named(tmp_path):
    for folder, message in ((tmp_path / "absent", "no such folder"), (tmp_path, "no run folder below")):
        with pytest.raises(InputError, match=f"{folder}: {message}"):
            campaign.find(folder)
