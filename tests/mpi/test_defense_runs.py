"""The defence on several ranks and over restarts: bits do not depend on either, neither by queries nor first-order."""

import pytest
import torch
from input_texts import DEFENSE, text
from mpi_launch import Case, assert_same, batch, bits, column, sets

USER = """
import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(64, classes)

    def forward(self, x):
        return self.fc(torch.tanh(self.conv(x)).flatten(1))


def net():
    torch.manual_seed(3)
    return Net()


def classify(images):
    return net()(torch.from_numpy(images)).detach().numpy()


def images():
    draw = np.random.default_rng(7)
    return [(draw.integers(0, 256, (n, 3, 8, 8), np.uint8), np.arange(n) % 3) for n in (39, 17)]
"""
INPUT = text(DEFENSE, task={"classifier": "defended:classify"}, data={"name": "defended:images"})
WHITE = sets(task__classifier="net.th", task__classifier_model="defended:Net", zo__estimator="autograd", sparsity__ratio=0.0)
CONFIGS = {
    "cge": sets(model__trainable=["model.4.weight"]),
    "pre-training": sets(task__loss="mse", zo__estimator="autograd", sparsity__ratio=0.0, model__batch_norm=True),
    "first-order": WHITE,
    "latent": sets(model__name="ae-ds", model__latent=4, model__hidden=3, zo__estimator="latent", sparsity__ratio=0.0)
    + sets(model__trainable=["denoiser.*", "encoder.*"]),
    "zo-grasp": sets(zo__engine="reuse", sparsity__scores="zo-grasp", sparsity__q=3),
}
RESTARTED = ("cge", "pre-training", "latent")  # after step 3 of 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each on one rank, undisturbed; and on three ranks, some of them restarted."""
    place = tmp_path_factory.mktemp("defense")
    (place / "defended.py").write_text(USER)
    (place / "input.toml").write_text(INPUT)
    space: dict = {}
    exec(USER, space)
    torch.save(space["net"]().state_dict(), place / "net.th")

    def case(name: str, folder: str, *more: str) -> Case:
        return Case(f"{folder}-{name}", "train", ["input.toml", "--run-dir", f"{folder}/{name}", *CONFIGS[name], *more])

    for result in batch(1, place, [case(name, "1") for name in CONFIGS]).values():
        result.succeeded()
    first = [case(name, "3", *(["--set", "stop.steps=3"] if name in RESTARTED else [])) for name in CONFIGS]
    rests = [Case(f"rest-{name}", "train", case(name, "3").args) for name in RESTARTED]
    for result in batch(3, place, first + rests).values():
        result.succeeded()
    return place


@pytest.mark.parametrize("name", CONFIGS)
def test_bits_depend_neither_on_ranks_nor_on_restarts(runs, name):
    but = ("config", "metrics/eval")  # a half made an evaluation at its end
    alone = bits(runs / "1" / name, but)
    assert_same(alone, bits(runs / "3" / name, but))
    assert column(runs / "3" / name, "eval/accuracy")[-1:] == column(runs / "1" / name, "eval/accuracy")[-1:]
    assert column(runs / "1" / name, "train/step") == [1, 2, 3, 4, 5, 6]


def test_pre_training_lowers_the_error(runs):
    before, after = (column(runs / "1" / "pre-training", "train/loss")[k] for k in (0, -1))
    assert after < before


def test_only_trainable_parameters_move(runs):
    partly, wholly = (bits(runs / "1" / name) for name in ("cge", "zo-grasp"))  # from the same starting weights
    assert {p for p in partly if p.startswith("optimizer/exp_avg/model")} == {"optimizer/exp_avg/model.4.weight"}
    different = {place for place in wholly if place.startswith("params/model") and partly[place] != wholly[place]}
    assert {"params/model.0.weight", "params/model.2.bias", "params/model.4.weight"} <= different
