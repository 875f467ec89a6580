"""Engines and tasks on pretended CUDA tensors: no two devices meet, and a gradient makes the host wait once, for its results."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from delta_nets import VGG, DnCNN, Normed, TinyTransformer
from pretended import Pretended
from torch import nn

from dzhpc import config
from dzhpc.engines import make_engine
from dzhpc.engines.budget import budget
from dzhpc.job.world import World
from dzhpc.method.estimators import make_estimator
from dzhpc.models.cnn import SimpleCNN
from dzhpc.models.resnet import ResNet
from dzhpc.tasks import make_task
from dzhpc.tasks.sol import reference
from dzhpc.tasks.sol.wake import Wake
from dzhpc.training.distribution import Distribution

CUDA = torch.device("cuda")


class Odd(nn.Module):
    """Windows that do not divide an image, a circular border, a buffer that moves, an operation without a rule."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular")
        self.pool, self.norm, self.fc = nn.AdaptiveMaxPool2d(3), nn.BatchNorm1d(54), nn.Linear(54, 10)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        return torch.sin(self.fc(self.norm(self.pool(self.conv(x)).flatten(1))))


NETWORKS = {
    "cnn": SimpleCNN(1),
    "resnet": ResNet([1, 1], [4, 8], False, 10, 3),
    "vgg": VGG(),
    "normed": Normed(),
    "transformer": TinyTransformer(),
    "denoiser": DnCNN(),
    "odd": Odd(),
}
ENGINES = [("full", "fp32"), ("reuse", "fp32"), ("delta", "fp32"), ("delta", "bf16")]


@pytest.mark.parametrize(("kind", "precision"), ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_engine_waits_for_the_device_while_it_evaluates(name, kind, precision):
    network = copy.deepcopy(NETWORKS[name])
    parameters = list(network.parameters())
    for p in parameters:  # the longest route: each takes a second to trace
        p.requires_grad_(p is parameters[0])
    with Pretended() as gpu:
        inputs = torch.randn(64, 3, 16, 16).to(CUDA)
        targets = inputs if name == "denoiser" else torch.randint(0, 10, (64,)).to(CUDA)
        engine = make_engine(kind, network.to(CUDA), "mse" if name == "denoiser" else "cross_entropy", precision)
        engine.bind(inputs, targets)
        assert gpu.waits["a number for the host"]  # the base loss
        last = engine.index.offsets[1:] - 1
        coords = np.array([last[0], 0])  # in no order
        engine.differences(coords, 1e-3)  # traces what would be compiled
        gpu.waits.clear()
        gpu.launches.clear()
        found = engine.differences(coords, 1e-3)
        assert (found.device.type, list(found.shape), found.dtype) == ("cuda", [2], torch.float32)
        engine.directional([torch.ones(engine.index.size, device=CUDA)], 1e-3)
        assert gpu.launches and not gpu.waits


@pytest.mark.parametrize(("gigabytes", "mib"), [(8, 1024), (16, 2048), (24, 4096), (40, 4096), (80, 4096), (141, 4096)])
def test_the_memory_of_a_chunk_follows_from_the_card(gigabytes, mib):
    with Pretended(memory=gigabytes * 10**9):
        size, why = budget(CUDA)
    assert size == mib * 2**20 and why.startswith(f"a quarter of the card's {gigabytes * 10**9 / 2**30:.1f} GiB, ")


def test_a_gpu_has_more_coordinates_at_once_where_their_changes_are_small():
    sizes = []
    for channels, pixels in ((8, 32), (64, 8)):
        with Pretended():
            convolutions = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.Conv2d(channels, 64, 3, padding=1)
            network = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64 * pixels**2, 10))
            engine = make_engine("delta", network.to(CUDA), "cross_entropy", "bf16")
            engine.bind(torch.randn(512, 3, pixels, pixels).to(CUDA), torch.randint(0, 10, (512,)).to(CUDA))
            sizes.append(max(map(len, engine.cut(engine.index.range("2.weight")))))
            assert "and 512 coordinates" in engine.explain()
    assert sizes == [16, 256]  # 4 GiB for four changes of 64 and of 4 MiB


def test_the_pretence_sees_what_it_is_there_to_see():
    with Pretended() as gpu:
        x = torch.ones(3, 4).to(CUDA)
        with pytest.raises(RuntimeError, match=r"aten.add.Tensor of tensors on cuda:0 and cpu \[3, 4\]"):
            x + torch.ones(3, 4)
        assert float(x.sum()) == 1 and (x + torch.tensor(1.0)).device.type == "cuda"  # a number of the host may meet all
        bool((x > 0).any()), x[x > 0], x.cpu(), x.new_tensor([1, 2]), torch.equal(x, x), torch.cuda.synchronize()
        torch.ones(3).pin_memory().to(CUDA, non_blocking=True)  # the one way that nobody waits for
    assert gpu.waits == {"to the device": 2, "a number for the host": 2, "aten.index": 1, "to the host": 1, "aten.equal": 1,
                         "synchronize": 1}  # fmt: skip
    assert not torch.cuda.is_initialized()


MODULE = """
import numpy as np, torch
from torch import nn

def images():
    draw = np.random.default_rng(0)
    return [(draw.integers(0, 256, (n, 3, 16, 16), np.uint8), np.arange(n) % 4) for n in (64, 8)]

class Net(nn.Sequential):
    def __init__(self, classes):
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(1024, classes))

def classify(images):
    return np.abs(images.reshape(len(images), 4, -1).mean(2)) + 0.1

def ring(states, parameters):
    return 0.9 * states

class Bowl:
    def initial(self):
        return np.ones(5)

    def __call__(self, thetas, step):
        return (thetas**2).sum(1)
"""
COMMON = ("run.seed=1", "zo.mu=1e-3", "eval.every_epochs=1")
DATA = (*COMMON, "data.name=own_gpu:images", "data.augment=true", "data.batch_size=32", "eval.batch_size=8")
DEFENSE = (*DATA, "task.kind=defense", "model.name=dncnn", "model.depth=3", "model.width=4", "data.augment=false")
SOL = (*COMMON, "task.kind=sol", "task.resolution=8", "task.factor=2", "task.unroll=2", "data.batch_size=2", "data.name=wake",
       "model.name=corrector", "model.widths=[2]")  # fmt: skip
TASKS = {  # -> (keys, waits of an evaluation beside those for its results; a box on the host has to be asked, chunk by chunk)
    "classification": ((*DATA, "model.name=own_gpu:Net"), {}),
    "random directions": ((*DATA, "model.name=own_gpu:Net", "zo.estimator=rge", "zo.q=3"), {}),
    "pre-training": ((*DEFENSE, "task.loss=mse"), {}),
    "defense": ((*DEFENSE, "task.classifier=own_gpu:classify"), {"to the host": 4, "to the device": 4}),
    # whether a step has diverged, and whether a state is not changed: no NaN, and nothing twice, reaches a simulator
    "wake": ((*SOL, "task.simulator=projected"), {"a number for the host": 2 * (2 * 2 + 1)}),
    "wake, engine full": ((*SOL, "task.simulator=projected", "zo.engine=full"), {"a number for the host": 9 * 2}),
    "ring": (
        (*SOL, "task.simulator=own_gpu:ring"),
        {"a number for the host": 2 * (2 * 2 + 1), "to the host": 2 * 2, "to the device": 2},
    ),
    "objective": ((*COMMON, "task.kind=objective", "task.function=own_gpu:Bowl", "sparsity.ratio=0.0"), None),  # on the CPU
}  # fmt: skip


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "own_gpu.py").write_text(MODULE)
    draw = np.random.default_rng(0)
    states = draw.standard_normal((2, 4, *Wake(8).shape))
    about = {"staggered": True, "resolution": 8, "factor": 2, "radius": 10.0}
    reference.save(folder / "wake.h5", {s: (states, np.array([1e5, 2e5])) for s in ("train", "valid", "test")}, about)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("DZHPC_DATA", str(folder))
        yield


@pytest.mark.parametrize("name", TASKS)
def test_a_step_of_every_task_waits_for_its_results_alone(user, name):
    keys, asks = TASKS[name]
    with Pretended() as gpu:
        task = make_task(config.load(None, list(keys)), CUDA)
        device = task.engine.index.device.type
        assert device == ("cpu" if asks is None else "cuda")
        estimator, size = make_estimator(task.config.zo, 1), task.engine.index.size
        distribution = Distribution(World(), task)
        distribution.shards.begin(0)
        distribution.shards.use(0)
        distribution.assign(np.arange(0, size, max(1, size // 8)), estimator)
        distribution.estimate(estimator, 0)
        gpu.waits.clear()
        distribution.shards.begin(0)
        distribution.shards.use(0)
        base = Counter(gpu.waits)
        gpu.waits.clear()
        assert distribution.estimate(estimator, 0)[1].device.type == device
        assert gpu.waits - base == (
            Counter() if asks is None else Counter(asks) + Counter({"to the host": 1, "to the device": 1})
        )
        assert task.evaluate(range(task.evaluation_parts), 0).shape == (task.evaluation_parts, 3)
        task.bind_for_scores(0)
