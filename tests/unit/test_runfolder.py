"""The run folder: which checkpoint a restart finds, and what stays of an earlier run."""

import json

import numpy as np
import pytest
import torch

from dzhpc import config
from dzhpc.errors import CheckpointError, InputError
from dzhpc.files.checkpoint import State
from dzhpc.files.metrics import Metrics
from dzhpc.files.runfolder import RunFolder
from dzhpc.job.lock import Lock
from dzhpc.training.launch import open_folder


def state(step):
    weights = {"w": torch.full((3,), float(step))}
    return State("", [], step, 0.0, 0, 0.0, "u", "s", 0, weights, {}, {}, np.arange(3), None)


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


def names(folder):
    return [p.name for p in folder.checkpoint_files()]


def test_the_newest_files_are_kept_by_step_and_not_by_name(folder):
    for step in (2, 99_999_999, 10, 100_000_000):
        folder.save(state(step), keep=3)
    assert names(folder) == ["step-100000000.h5", "step-99999999.h5", "step-00000010.h5"]
    assert folder.newest_state()[1].step == 100_000_000


def test_damaged_checkpoints_are_skipped_with_a_warning(folder, caplog):
    for step in (9, 10):
        folder.save(state(step), keep=3)
    newest = folder.checkpoint_path(10)
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level("WARNING", "dzhpc"):
        path, found = folder.newest_state()
    assert (str(path), found.step, found.params["w"].tolist()) == (str(folder.checkpoint_path(9)), 9, [9.0] * 3)
    assert f"skipped: {newest}: damaged" in caplog.text


def test_whatever_happens_to_the_newest_file_the_right_state_comes_back(folder):
    """Cut at 20 places and with 200 single flipped bytes: its own state, or that of the file before."""
    for step in (9, 10):
        folder.save(state(step), keep=3)
    newest, draw = folder.checkpoint_path(10), np.random.default_rng(0)
    whole = newest.read_bytes()
    damaged = [whole[: int(n)] for n in np.linspace(0, len(whole) - 1, 20)]
    for place in draw.integers(0, len(whole), 200):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(draw.integers(8))
        damaged.append(bytes(flipped))
    found = []
    for content in damaged:
        newest.write_bytes(content)
        path, loaded = folder.newest_state()
        assert (path, loaded.params["w"].tolist()) == (str(folder.checkpoint_path(loaded.step)), [float(loaded.step)] * 3)
        found.append(loaded.step)
    assert set(found[:20]) == {9}
    assert found.count(10) <= 40  # flips in the unused rest of the user block, 435 of some 9,000 bytes


def test_an_empty_folder_has_no_state_and_one_of_damaged_files_is_an_error(folder):
    assert folder.newest_state()[1] is None
    for step in (1, 2):
        folder.checkpoint_path(step).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"none of 2 checkpoints can be read; to start afresh use --restart never"):
        folder.newest_state()


def test_starting_afresh_moves_all_of_the_earlier_run_aside_and_loses_nothing(folder):
    for step in (5, 6):
        folder.save(state(step), keep=3)
    Metrics(folder.metrics).flush()
    folder.set_aside()
    assert (names(folder), folder.metrics.exists()) == ([], False)
    kept = sorted(p.name for p in (folder.path / "previous-001").iterdir())
    assert kept == ["metrics.h5", "step-00000005.h5", "step-00000006.h5"]
    folder.save(state(1), keep=3)
    folder.set_aside()
    assert [p.name for p in (folder.path / "previous-002").iterdir()] == ["step-00000001.h5"]


def test_restarting_from_an_earlier_checkpoint_moves_only_newer_ones_aside(folder):
    for step in (5, 6, 7):
        folder.save(state(step), keep=3)
    folder.set_aside(after_step=5)
    assert names(folder) == ["step-00000005.h5"]


def test_what_a_killed_writer_left_is_removed(folder):
    stale = folder.checkpoints / "step-00000005.h5.4711.tmp"
    stale.write_bytes(b"half")
    assert names(folder) == []
    folder.create()
    assert not stale.exists()


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=rf"{tmp_path}/file/run: the run folder cannot be written .*--run-dir"):
        RunFolder(tmp_path / "file" / "run").create()


def test_each_launch_gets_its_own_manifest(folder):
    for command in (["a"], ["b"]):
        folder.write_manifest({"command": command})
    found = {p.name: json.loads(p.read_text())["command"] for p in (folder.path / "launches").glob("*.json")}
    assert found == {"001.json": ["a"], "002.json": ["b"]}


def test_what_a_user_has_in_the_folder_is_never_written_over(tmp_path):
    notes = "# my notes\n" + config.load().to_toml()
    kept = {
        "input.toml": notes, "log.txt": "dear diary\n", "data.csv.tmp": "1", "deep/x.tmp": "2", "report/report.md": "mine",
        "report/curves.png": "mine", "launches/note.txt": "3", "step-1.h5.tmp": "4",
    }  # fmt: skip
    for name, text in kept.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    folder = RunFolder(tmp_path)
    for seed in range(2):  # the second launch writes over the first one's, and over nothing else
        folder.check_foreign()
        folder.create()
        resolved = config.load(None, [f"run.seed={seed}"]).to_toml()
        folder.write_input(resolved)
        with folder.log.open("a") as file:
            file.write("2026-01-01 00:00:00 begun\n")
        assert {name: (tmp_path / name).read_text() for name in kept} == kept
        assert (tmp_path / "input-dzhpc.toml").read_text() == resolved
    assert (tmp_path / "log-dzhpc.txt").read_text().count("begun") == 2
    folder.save(state(3), keep=3)
    folder.set_aside()
    assert {name: (tmp_path / name).read_text() for name in kept} == kept
    aside = {path.name for path in (tmp_path / "previous-001").iterdir()}
    assert aside == {"input-dzhpc.toml", "log-dzhpc.txt", "step-00000003.h5"}


@pytest.mark.parametrize("written_by", ["0.1", "now"])
def test_our_own_input_and_log_are_gone_on_with(tmp_path, written_by, project):
    folder = RunFolder(tmp_path)
    folder.create()
    earlier = project / "tests" / "regression" / "written_by_0.1"
    old = next(earlier.rglob("input.toml")).read_text() if written_by == "0.1" else config.load().to_toml()
    (tmp_path / "input.toml").write_text(old)
    (tmp_path / "log.txt").write_text("2026-01-01 00:00:00 begun\n")
    assert (folder.input.name, folder.log.name) == ("input.toml", "log.txt")


def test_a_start_from_nothing_keeps_the_record_that_it_finds(tmp_path):
    """Somebody has removed the checkpoints, which are large, or copied the record of another run."""
    folder = RunFolder(tmp_path)
    Metrics(folder.metrics).flush()
    lock = Lock(tmp_path)
    assert open_folder(folder, lock, "auto", None) == (None, "", "")
    lock.release()
    assert not folder.metrics.exists() and (tmp_path / "previous-001" / "metrics.h5").exists()


def test_metrics_of_another_program_are_refused(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "metrics.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(InputError, match=r"metrics\.h5: was not written by dzhpc and would be lost; move it.*--run-dir"):
        folder.check_foreign()


def test_a_folder_stays_where_it_was_when_the_working_directory_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("runs/a")
    folder.create()
    monkeypatch.chdir("/")
    folder.save(state(1), keep=3)
    assert names(folder) == ["step-00000001.h5"] and (tmp_path / "runs/a/checkpoints/step-00000001.h5").exists()
