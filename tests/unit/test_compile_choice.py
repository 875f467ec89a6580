"""Whether a compiler is used follows from the input alone, once; bf16 without its products is refused."""

import numpy as np
import pytest
import torch

import dzhpc
from dzhpc import config
from dzhpc.engines.kernels import compiled
from dzhpc.errors import InputError
from dzhpc.job import device as devices
from dzhpc.models.cnn import SimpleCNN
from dzhpc.tasks import make_task

SHORT = ["model.name=cnn", "model.depth=1", "model.width=4", "data.name=digits", "data.batch_size=100", "sparsity.ratio=0.5"]
needs_compiler = pytest.mark.skipif(compiled.compiler() is None, reason="there is no C++ compiler")


def decided(*keys: str) -> str:
    task = make_task(config.load(None, [*SHORT, *keys]), torch.device("cpu"))
    task.bind(0)
    return task.engine.environment["compiled"]


@pytest.mark.compiles
@needs_compiler
def test_the_decision_is_queries_times_values_and_no_key_that_may_change_on_restart(caplog, monkeypatch):
    caplog.set_level("INFO", "dzhpc")
    assert decided("stop.epochs=5") == "False"
    # 36 + 4 + 8 + 40 + 10 coordinates, of which half the 76 weights are active; 14 steps an epoch (the rest of 1,437 is left out)
    assert "not compiled: 4,200 queries of " in caplog.text
    assert decided("stop.epochs=5", "zo.compile=on") == "True"
    assert decided("stop.epochs=5", "zo.difference=central") == "False"
    assert "not compiled: 8,400 queries of " in caplog.text
    assert decided("stop.epochs=5", "zo.estimator=rge") == "False"  # directions pass no compiled code
    size = 4 * 100 * (64 * 4 * 3 + 16 * 4)  # bytes at least: what convolution, BatchNorm, ReLU and pool give
    monkeypatch.setattr(compiled, "WORTH", 4200.0 * size)
    assert decided("stop.epochs=5") == decided("stop.epochs=5", "stop.steps=1", "stop.queries=9") == "True"
    assert decided("stop.epochs=5", "zo.compile=off") == "False"
    assert decided("stop.epochs=2.5") == "False"


def test_without_a_compiler_by_choice_nothing_of_it_is_started(monkeypatch):
    def started(*args, **kwargs):
        raise AssertionError("the compiler was asked")

    monkeypatch.setattr(compiled.Programs, "compile", started)
    engine = dzhpc.make_engine("delta", SimpleCNN(depth=2, width=16), "cross_entropy", queries=0)
    engine.bind(torch.randn(64, 3, 16, 16), torch.randint(0, 10, (64,)))
    assert engine.environment == {"compiled": "False", "kernels": "none"}
    assert torch.isfinite(engine.differences(np.arange(0, engine.index.size, 50), 1e-3)).all()


def test_bf16_without_its_products_is_refused_unless_forced(monkeypatch):
    monkeypatch.setattr(devices, "has_fast_bf16", lambda device: False)
    net = SimpleCNN(depth=1, width=4)
    with pytest.raises(InputError, match=r'bf16".* no bfloat16 products, .*use "fp32" \(or force it by zo.emulate_bf16 = true\)'):
        dzhpc.make_engine("delta", net, "cross_entropy", "bf16")
    dzhpc.make_engine("delta", net, "cross_entropy", "bf16", emulate_bf16=True)
    assert config.Config().zo.precision == "fp32"
