"""What every rank makes by itself: noise in a loss is told from rounding. Several ranks are in tests/mpi."""

import math
import random
import sys
import types

import numpy as np
import pytest
import torch

from dzhpc import config
from dzhpc.errors import InputError
from dzhpc.job.world import World
from dzhpc.tasks import agreement, make_task
from dzhpc.training import launch

OWN = config.load(None, ["task.kind=objective", "task.function=own:Loss", "sparsity.ratio=0.0"])


@pytest.mark.parametrize("losses", [[1.5], [1.5, 1.5], [math.nan, math.nan], [math.inf, math.inf], [0.0, 0.0]])
def test_equal_losses_are_accepted_without_a_word(losses, caplog, monkeypatch):
    monkeypatch.setattr(agreement.log, "propagate", True)
    agreement.check_losses(World(), OWN, losses)
    assert caplog.messages == []


@pytest.mark.parametrize("losses", [[1.0, 1.001], [1.0, math.nan], [math.inf, 1.0], [0.0, 1e-9]])
def test_noise_is_refused_with_the_name_of_the_function(losses):
    with pytest.raises(
        InputError, match=r"^task\.function = own:Loss: \S+ and then \S+ for the same theta and the same batch; a loss"
    ):
        agreement.check_losses(World(), OWN, losses)


def test_rounding_is_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(agreement.log, "propagate", True)
    agreement.check_losses(World(), OWN, [1.0, 1.000001])
    assert list(dict.fromkeys(caplog.messages)) == [
        "task.function = own:Loss: 1.0 and then 1.000001 for the same theta and the same batch: bits will not come again"
    ]


def test_what_ranks_compare_is_what_user_code_makes():
    keys = ["data.name=digits", "data.batch_size=100", "model.name=cnn", "model.depth=1"]
    task = make_task(config.load(None, keys), torch.device("cpu"))
    assert task.made() == {}  # the root has read the data
    assert agreement.user_code(task.config) == {}
    assert agreement.user_code(OWN) == {"task.function": "own:Loss"}
    task.config.model.name = "own:Net"
    assert list(task.made()) == ["model.name = own:Net"]
    assert list(task.made()["model.name = own:Net"]) == [
        k for k, _ in [*task.model.named_parameters(), *task.model.named_buffers()]
    ]


class Noisy:
    """A loss that draws from a generator that everybody draws from."""

    def __init__(self, draw):
        self.draw = draw

    def initial(self):
        return np.ones(3)

    def __call__(self, thetas, step):
        return (thetas**2).sum(1) + self.draw()


@pytest.mark.parametrize("draw", [np.random.randn, random.random, lambda: float(torch.rand(()))])
def test_a_loss_that_draws_from_a_global_generator_is_refused_by_one_process(draw, monkeypatch):
    own = types.ModuleType("own_noise")
    own.Loss = Noisy(draw)
    monkeypatch.setitem(sys.modules, "own_noise", own)
    keys = ["task.kind=objective", "task.function=own_noise:Loss", "sparsity.ratio=0.0"]
    task = make_task(config.load(None, keys), torch.device("cpu"))
    with pytest.raises(InputError, match=r"own_noise:Loss: \S+ and then \S+ for the same theta"):
        launch.try_out(World(), task, False)
    monkeypatch.setattr(own.Loss, "draw", lambda: 0.5)
    launch.try_out(World(), task, False)
