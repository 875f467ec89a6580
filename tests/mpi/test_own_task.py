"""A task of the user's own, that of docs/recipes/extend.md, through public doors only: ``task.kind = "package.module:Class"``."""

import pages
import pytest
from mpi_launch import Case, assert_same, batch, bits, checkpoints, column, sets, tensor

MORE = """
class Forgetful(Sine):
    def __init__(self, config, device):
        self.config = config


class Unfinished(Task):
    def bind(self, step):
        return 0.0


class Other:
    pass
"""
INPUT = """
[task]
kind = "sine:Sine"
width = 6
[zo]
engine = "full"
mu = 1e-3
[sparsity]
ratio = 0.25
q = 4
[optim]
lr = 0.2
[stop]
epochs = 10
[eval]
every_epochs = 5
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory, project):
    """(folder, results on two ranks)."""
    place = tmp_path_factory.mktemp("own-task")
    recipe = next(block.text for block in pages.blocks(project, "python") if block.title == "sine.py")
    (place / "sine.py").write_text(f"{recipe}\n{MORE}")
    (place / "input.toml").write_text(INPUT)

    def case(name, folder, **keys):
        return Case(name, "train", ["input.toml", "--run-dir", folder, *sets(**keys)])

    batch(1, place, [case("alone", "alone")])["alone"].succeeded()
    cases = [case("half", "run", stop__steps=21), case("rest", "run"), case("width", "run", task__width=5)]
    cases += [case("unknown", "x", task__widht=5), case("limit", "limit", task__max_queries=60)]
    cases += [case(f"sine:{name}", "x", task__kind=f"sine:{name}") for name in ("Forgetful", "Unfinished", "Other", "Nobody")]
    return place, batch(2, place, cases)


def test_it_trains_on_two_ranks_and_over_a_restart_with_the_bits_of_one(done):
    place, results = done
    assert "restarting at step 21" in results["rest"].succeeded().out
    but = ("config", "metrics/eval")  # a half made an evaluation at its end
    assert_same(bits(place / "alone", but), bits(place / "run", but))
    assert tensor(checkpoints(place / "run")[-1], "params/0.weight").shape == (6, 1)
    losses = column(place / "run", "eval/loss")
    assert losses[-1] < 0.2 * column(place / "run", "train/loss")[0]


def test_its_keys_are_frozen_and_its_queries_counted(done):
    place, results = done
    results["width"].error(3, "task.width = 6, now 5: frozen keys cannot change on restart")
    assert "task.max_queries would be exceeded by the next step" in results["limit"].succeeded().out
    assert column(place / "limit", "train/queries") == [10 + 17, 10 + 2 * 17]  # scores 2 (1 + 4), a step 1 + 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown", "got an unexpected keyword argument 'widht'; its own keys of [task]: width"),
        ("sine:Forgetful", "its constructor sets no model, engine; see dzhpc.tasks.Task"),
        ("sine:Unfinished", "has no bind_for_scores, evaluate; see dzhpc.tasks.Task"),
        ("sine:Other", "expected a class derived from dzhpc.tasks.Task"),
        ("sine:Nobody", "module sine has no 'Nobody'"),
    ],
)
def test_what_is_no_task_is_refused_in_one_line(done, name, message):
    kind = "sine:Sine" if name == "unknown" else name
    done[1][name].error(2, f'task.kind = "{kind}": ' if message[0] != "m" else "task.kind = ", message)
