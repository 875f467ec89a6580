"""Locks: held by the living, taken over from the dead, never from one who cannot be judged."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from dzhpc.errors import InputError, LaunchError
from dzhpc.job import lock, process

HOLD = (
    "import sys, time; from pathlib import Path; from dzhpc.job.lock import Lock; "
    "Lock(Path(sys.argv[1])).acquire(); time.sleep(60)"
)


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of the folder."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)])
    end = time.monotonic() + 60
    while lock.read(tmp_path / "lock.json") is None:
        assert time.monotonic() < end
    yield child
    child.kill()
    child.wait()


def test_a_living_holder_is_named_and_a_killed_one_is_followed(tmp_path, other):
    mine = lock.Lock(tmp_path)
    with pytest.raises(LaunchError, match=rf"{tmp_path}: in use by process {other.pid} on host .*--run-dir.*delete .*lock\.json"):
        mine.acquire()
    assert lock.holder(tmp_path)["pid"] == other.pid
    shutil.copytree(tmp_path, copy := tmp_path.with_name(f"{tmp_path.name}-copy"))  # nobody is at work in the copy
    assert lock.holder(copy) is None and lock.Lock(copy).acquire() == ""
    (link := tmp_path.with_name(f"{tmp_path.name}-link")).symlink_to(tmp_path)
    assert lock.holder(link)["pid"] == other.pid
    other.kill()  # and not waited for: a zombie has ended, too
    end = time.monotonic() + 10
    while lock.holder(tmp_path) is not None:
        assert time.monotonic() < end
    assert f"process {other.pid} " in mine.acquire()
    assert lock.holder(tmp_path)["pid"] == os.getpid()
    mine.release()
    assert os.listdir(tmp_path) == []


def written(folder, **changes):
    """A lock as another host would have written it."""
    owner = process.identity() | {"host": "elsewhere", "pid": 1} | changes
    (folder / "lock.json").write_text(json.dumps(owner))


@pytest.mark.parametrize("job", [None, "11"])
def test_a_lock_of_another_host_stays_where_nobody_can_be_asked(tmp_path, monkeypatch, job):
    """With Slurm: tests/slurm/test_lock_of_a_job.py."""
    monkeypatch.setenv("PATH", str(tmp_path))
    written(tmp_path, job_id=job)
    with pytest.raises(LaunchError, match="in use by process 1 on host elsewhere" + (rf" \(Slurm job {job}\)" if job else ";")):
        lock.Lock(tmp_path).acquire()
    assert json.loads((tmp_path / "lock.json").read_text())["host"] == "elsewhere"


def test_a_requeued_job_takes_over_from_its_earlier_self(tmp_path, monkeypatch):
    written(tmp_path, job_id="11", restart_count="0")
    monkeypatch.setenv("SLURM_JOB_ID", "11")
    with pytest.raises(LaunchError):
        lock.Lock(tmp_path).acquire()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "Slurm job 11" in lock.Lock(tmp_path).acquire()


@pytest.mark.parametrize("change", [{"started": "1"}, {"boot": "another"}, {"pid": 2**22 + 7}])
def test_a_process_number_that_was_given_to_another_is_no_holder(tmp_path, change):
    (tmp_path / "lock.json").write_text(json.dumps(process.identity() | change))
    assert lock.holder(tmp_path) is None
    assert lock.Lock(tmp_path).acquire() != ""


@pytest.mark.parametrize("content", ["", '{"host": "a'])
def test_a_lock_without_content_is_nobodys(tmp_path, content):
    (tmp_path / "lock.json").write_text(content)
    assert lock.Lock(tmp_path).acquire() == ""
    assert lock.holder(tmp_path)["pid"] == os.getpid()


def test_only_the_holder_releases(tmp_path):
    first, second = lock.Lock(tmp_path), lock.Lock(tmp_path)
    first.acquire()
    with pytest.raises(LaunchError):
        second.acquire()
    second.release()
    assert lock.holder(tmp_path) is not None


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent: the run folder cannot be written"):
        lock.Lock(tmp_path / "absent").acquire()


@pytest.mark.parametrize("content", ["[]", '{"pid": 1}', "3", '"text"'])
def test_what_is_no_lock_of_ours_is_named_and_stays(tmp_path, content):
    (tmp_path / "lock.json").write_text(content)
    with pytest.raises(LaunchError, match=r"lock\.json: is no lock that dzhpc wrote; remove it if nobody is at work there"):
        lock.Lock(tmp_path).acquire()
    assert (tmp_path / "lock.json").read_text() == content and lock.holder(tmp_path) is None


def test_nor_is_a_folder(tmp_path):
    (tmp_path / "lock.json").mkdir()
    with pytest.raises(LaunchError, match=r"lock\.json: cannot be read as a lock \(Is a directory\)"):
        lock.Lock(tmp_path).acquire()
    assert lock.holder(tmp_path) is None
