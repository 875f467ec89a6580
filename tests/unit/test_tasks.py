"""Classification: batches as functions of the step, evaluation in parts, models and data that do not fit."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dzhpc import config
from dzhpc.errors import InputError
from dzhpc.tasks import make_task

MODULE = """
from torch import nn


class Flat(nn.Module):
    \"\"\"Calls view, which channels-last features refuse.\"\"\"

    def __init__(self, classes):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(192, classes)

    def forward(self, x):
        h = self.conv(x)
        return self.fc(h.view(h.shape[0], -1))


class TooWide(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 11)

    def forward(self, x):
        return self.fc(x.flatten(1))


class Auxiliary(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.fc = nn.Linear(64, classes)

    def forward(self, x):
        x = self.fc(x.flatten(1))
        return (x, x) if self.training else x


class Large(TooWide):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3072, 10)
"""


@pytest.fixture(scope="module", autouse=True)
def user_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "own_models.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def task_of(*overrides, model=("model.name=cnn", "model.depth=1", "model.width=4")):
    keys = ["data.name=digits", "data.batch_size=100", *model, *overrides]
    return make_task(config.load(None, keys), torch.device("cpu"))


def test_classes_and_channels_follow_from_the_data_and_the_users_config_stays_as_it_is():
    given = config.load(None, ["data.name=digits", "model.name=cnn"])
    task = make_task(given, torch.device("cpu"))
    assert task.config.model.fields == {"classes": 10, "in_channels": 1}
    assert given.model.fields == {}
    assert task.steps_per_epoch == 1437 // 512


@pytest.mark.parametrize("key", ["classes=7", "in_channels=3"])
def test_a_model_for_other_classes_or_channels_is_refused(key):
    name, value = key.split("=")
    with pytest.raises(InputError, match=rf"model\.{name} = {value}: the data set digits has 1.*; leave the key out"):
        task_of(f"model.{key}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("TooWide", r"model own_models:TooWide gives \[2, 11\] for inputs \[2, 1, 8, 8\]; expected \[2, 10\], a logit per class"),
        (
            "Auxiliary",
            r"model own_models:Auxiliary gives tuple for inputs \[2, 1, 8, 8\] while it is trained; expected \[2, 10\]",
        ),
        ("Large", r"model own_models:Large cannot take inputs \[1, 8, 8\]: .*shapes cannot be multiplied"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        task_of(model=[f"model.name=own_models:{name}"])


def test_a_model_that_cannot_run_in_channels_last_layout_runs_in_the_other():
    task = task_of(model=["model.name=own_models:Flat"])
    loss = task.bind(0)
    assert loss == pytest.approx(np.log(10), abs=0.6)
    assert task.model.conv.weight.is_contiguous()


def test_a_step_binds_the_same_batch_whenever_it_is_asked_for():
    task = task_of()
    losses = [task.bind(k) for k in (5, 3, 5)]
    assert losses[0] == losses[2] != losses[1]
    images, labels = task.batches.batch(5)
    with torch.no_grad():
        assert losses[0] == pytest.approx(float(F.cross_entropy(task.model(images).double(), labels)), rel=1e-5)


@pytest.mark.parametrize(("batch_size", "parts"), [(360, 1), (100, 4), (7, 52)])
def test_parts_of_an_evaluation_add_up_to_the_loss_and_accuracy_of_the_test_set(batch_size, parts):
    task = task_of(f"eval.batch_size={batch_size}")
    assert task.evaluation_parts == parts
    rows = np.concatenate([task.evaluate(range(rank, parts, 3), 0) for rank in range(3)])
    loss, correct, count = rows.sum(0)
    with torch.no_grad():
        outputs = task.model.eval()(task.data.normalise(task.data.test.images))
    assert count == 360
    assert correct == (outputs.argmax(1) == task.data.test.labels).sum()
    assert loss == pytest.approx(float(F.cross_entropy(outputs.double(), task.data.test.labels, reduction="sum")), rel=1e-6)


def test_an_evaluation_leaves_the_running_statistics_alone():
    task = task_of()
    task.bind(0)
    before = [b.clone() for b in task.model.buffers()]
    task.evaluate(range(task.evaluation_parts), 0)
    assert all(torch.equal(a, b) for a, b in zip(before, task.model.buffers(), strict=True))
