"""What asks a run to stop: the file STOP, whatever it is."""

import subprocess
import sys

import pytest

from dzhpc import config
from dzhpc.job.stopping import Reason, Requests


@pytest.fixture
def requests(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    return Requests(config.load(), tmp_path)


@pytest.mark.parametrize("make", ["touch", "mkdir"])
def test_a_stop_that_is_found_is_taken_away(requests, tmp_path, make):
    getattr(tmp_path / "STOP", make)()
    assert requests.reason() is Reason.STOP_FILE
    assert not (tmp_path / "STOP").exists() and requests.reason() is Reason.STOP_FILE


def test_one_that_cannot_be_taken_away_stops_all_the_same_and_is_named(requests, tmp_path, caplog):
    (tmp_path / "STOP" / "full").mkdir(parents=True)
    with caplog.at_level("WARNING", "dzhpc"):
        assert [requests.reason(), requests.reason()] == [Reason.STOP_FILE] * 2
    assert caplog.text.count("STOP: cannot be removed (Directory not empty); remove it before the next launch") == 1


WARNED = """
import subprocess, time
from dzhpc.job import stopping
stopping.listen()
subprocess.Popen(["sh", "-c", "while kill -USR1 $PPID 2> /dev/null; do :; done"])
time.sleep(0.1)
stopping.ignore_warnings()
"""


def test_a_warning_that_comes_while_python_ends_does_not_kill_it():
    assert subprocess.run([sys.executable, "-c", WARNED], timeout=60).returncode == 0
