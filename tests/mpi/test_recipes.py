"""An estimator, a layer, a kernel: the recipes of docs/recipes/extend.md run as they stand, on two ranks, by public doors alone.

The recipe for a task has a module of its own, test_own_task.
"""

import numpy as np
import pages
import pytest
from mpi_launch import Case, assert_same, attributes, batch, bits, checkpoints, column, sets, tensor

NETWORKS = {
    "estimator": "",
    "layer": """
class Net(torch.nn.Sequential):
    def __init__(self, classes, in_channels):
        conv, head = torch.nn.Conv2d, [torch.nn.Flatten(), torch.nn.Linear(64, classes)]
        super().__init__(conv(in_channels, 4, 3), torch.nn.BatchNorm2d(4), Squared(4), conv(4, 4, 3), Squared(4), *head)
""",
    "kernel": """
class Net(torch.nn.Sequential):
    def __init__(self, classes, in_channels):
        convs = [torch.nn.Conv2d(a, 8, 3, padding=1) for a in (in_channels, 8, 8)]
        super().__init__(*convs, torch.nn.Flatten(), torch.nn.Linear(512, classes))
""",
}
INPUT = """
[model]
name = "{name}:Net"
[data]
name = "digits"
batch_size = 64
train_limit = 640
augment = false
[sparsity]
ratio = 0.9
scores = "random"
[optim]
lr = 0.02
warmup_epochs = 0.0
[eval]
batch_size = 360
[stop]
epochs = 1
steps = 2
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory, project):
    """(folder, results by name and rank count, what runs one more on one rank, as a kernel has to be compiled there)."""
    place = tmp_path_factory.mktemp("recipes")
    recipes = {block.title: block.text for block in pages.blocks(project, "python")}
    for name, network in NETWORKS.items():
        (place / f"{name}.py").write_text(f"{recipes[f'{name}.py']}\n{network}")
        (place / f"{name}.toml").write_text(INPUT.format(name=name))
    words = {
        "estimator": sets(zo__estimator="estimator:Antithetic", zo__q=5, zo__engine="reuse", model__name="cnn", model__width=4),
        "layer": sets(zo__mu=1e-4), "kernel": sets(zo__compile="on"),
    }  # fmt: skip
    case = lambda name, folder, more=(): Case(folder, "train", [f"{name}.toml", "--run-dir", folder, *words[name], *more])  # noqa: E731
    others = [name for name in NETWORKS if name != "kernel"]
    alone = [*(case(name, f"{name}-1") for name in others), case("layer", "layer-full", sets(zo__engine="full"))]
    results = batch(1, place, alone) | batch(2, place, [case(name, f"{name}-2") for name in NETWORKS])
    return place, results, lambda name: batch(1, place, [case(name, f"{name}-1")])


@pytest.mark.parametrize("name", ["estimator", "layer", pytest.param("kernel", marks=pytest.mark.long)])
def test_two_ranks_give_the_bits_of_one(done, name):
    place, results, alone = done
    (results | (alone(name) if name == "kernel" else {}))[f"{name}-1"].succeeded()
    results[f"{name}-2"].succeeded()
    assert_same(bits(place / f"{name}-1"), bits(place / f"{name}-2"))


def test_the_estimator_asks_for_two_losses_a_direction(done):
    assert column(done[0] / "estimator-2", "train/queries") == [11, 22]


def test_the_layer_has_a_rule_that_is_right(done):
    place, results, _ = done
    assert "one coordinate at a time" not in results["layer-2"].out
    full, delta = (tensor(checkpoints(place / f"layer-{how}")[-1], "params/1.weight") for how in ("full", "2"))
    assert np.abs(delta - full).max() < 1e-4 < np.abs(full - 1).max()  # both have moved, and alike


def test_the_kernel_is_on_record(done):
    found = attributes(checkpoints(done[0] / "kernel-2")[-1], "env")["kernels"]
    assert found.split("; ")[0] == "unfolded fp32"
