"""What may change on a restart: nothing that decides numbers, and the place of a file that was moved."""

from types import SimpleNamespace

import pytest
from torch import nn

from dzhpc import config
from dzhpc.errors import CheckpointError
from dzhpc.models.identity import model_sha256
from dzhpc.training.checks import check_restart
from dzhpc.training.launch import restarts

MODEL = nn.Linear(2, 2)


def check(old, new):
    """A restart of a defence with other keys than its checkpoint has."""
    kind = ["run.name=a", "task.kind=defense", "task.classifier=a:b"]
    state = SimpleNamespace(config=config.load(None, [*kind, *old]).to_toml(), model_sha256=model_sha256(MODEL))
    check_restart(state, "step.h5", SimpleNamespace(config=config.load(None, [*kind, *new]), model=MODEL))


@pytest.mark.parametrize("key", ["model.weights", "sparsity.lpr"])
def test_what_only_a_first_start_reads_may_change_or_go(key):
    check([f"{key}=a.h5"], [])
    check([f"{key}=a.h5"], [f"{key}=b.h5"])
    check([], [f"{key}=b.h5"])


@pytest.mark.parametrize("key", ["task.classifier", "data.path"])
def test_a_file_that_was_moved_may_be_named_by_its_new_place(key, tmp_path, caplog):
    old, new = tmp_path / "old", tmp_path / "new"
    root = f"data.root={tmp_path}"
    new.touch()
    with caplog.at_level("WARNING", "dzhpc"):
        check([root, f"{key}={old}"], [root, f"{key}={new}"])
    assert f"{key} was {old}, which is no longer there, now {new}: bits may differ if that is another" in caplog.text
    old.touch()  # both are there: which is meant?
    with pytest.raises(CheckpointError, match=f"step.h5 was written with {key} = '{old}', now '{new}': frozen keys"):
        check([root, f"{key}={old}"], [root, f"{key}={new}"])
    old.unlink()
    new.unlink()
    with pytest.raises(CheckpointError, match="frozen keys cannot change"):
        check([root, f"{key}={old}"], [root, f"{key}={new}"])


def test_a_function_is_no_file_that_could_have_moved():
    with pytest.raises(CheckpointError, match=r"task\.classifier = .a:b., now .c:d.: frozen keys"):
        check([], ["task.classifier=c:d"])


def test_a_launch_restarts_where_there_is_a_checkpoint_unless_it_is_told_otherwise(tmp_path):
    assert [restarts(tmp_path, how) for how in ("auto", "never", "step.h5")] == [False, False, True]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.h5").touch()
    assert [restarts(tmp_path, how) for how in ("auto", "never", "step.h5")] == [True, False, True]
