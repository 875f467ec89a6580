"""Fitting a network to the data: what they decide of its constructor's arguments, its memory layout, a first try, its engine."""

import logging
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from dzhpc.config import Config, Data
from dzhpc.engines import Delta, Full, Reuse, make_engine
from dzhpc.engines.losses import Loss
from dzhpc.engines.pinned import Pinned
from dzhpc.errors import DzhpcError, InputError
from dzhpc.method import scores
from dzhpc.method.coordinates import ParameterIndex
from dzhpc.method.estimators import make_estimator
from dzhpc.models import zoo

log = logging.getLogger("dzhpc")
T = TypeVar("T")


def build(config: Config, device: torch.device, **sizes: int) -> nn.Module:
    """The network of ``config.model``; sizes are filled in there, where it takes them and the input leaves them out.

    Raises InputError as :func:`dzhpc.models.zoo.build` does, and for parameters that cannot be perturbed.
    """
    zoo.fill_in(config.model, **sizes)
    model = zoo.build(config.model, config.run.seed).to(device)
    ParameterIndex.of(model)
    return model


def lay_out(model: nn.Module, trial: Callable[[torch.memory_format], T], images: bool = True) -> T:
    """``trial(layout)`` with the model's weights in that layout: the first one in which it raises no InputError.

    Channels-last is 2 to 4 times faster, but a network that calls ``view`` may refuse it; without images there is only the other.
    """
    if images:
        try:
            return trial(_with(model, torch.channels_last))
        except InputError:
            pass
    found = trial(_with(model, torch.contiguous_format))
    if images:
        log.info("model %s cannot run in channels-last layout; using the slower contiguous one", type(model).__name__)
    return found


def engine_of(config: Config, model: nn.Module, loss: str | Loss, steps_per_epoch: int) -> Full | Reuse | Delta:
    """The engine of ``config.zo``. Raises InputError as :func:`dzhpc.engines.make_engine` does."""
    zo = config.zo
    queries = {"on": math.inf, "off": 0.0}.get(zo.compile)
    if queries is None:
        queries = _coordinate_queries(config, model, steps_per_epoch)
    return make_engine(zo.engine, model, loss, zo.precision, zo.memory_mb, queries=queries, emulate_bf16=zo.emulate_bf16)


def _coordinate_queries(config: Config, model: nn.Module, steps_per_epoch: int) -> int:
    """What the whole schedule asks of single coordinates, a query for each shard; directions and scores pass no compiled code.

    It follows from frozen keys alone, so that neither a restart nor an early end changes what is decided by it.
    """
    index, estimator = ParameterIndex.of(model), make_estimator(config.zo, config.run.seed)
    prunable = sum(len(index.range(name)) for name in scores.prunable_layers(model, index, config.sparsity.prune))
    active = index.size - round(config.sparsity.ratio * prunable)
    steps = max(1, round(config.stop.epochs * steps_per_epoch))
    return steps * config.data.shards * estimator.perturbations(active) if estimator.by_coordinate else 0


def _with(model: nn.Module, layout: torch.memory_format) -> torch.memory_format:
    model.to(memory_format=layout)
    return layout


def try_out(model: nn.Module, inputs: Tensor, expected: list[int], meaning: str, name: str) -> None:
    """Run the model in eval and in train mode. Raises InputError unless it gives the shape ``expected``, which is ``meaning``.

    Its mode, buffers and the random numbers are left as they were.
    """
    mode = model.training
    try:
        for training in (False, True):
            with Pinned(model, inputs.device).unchanged(), torch.no_grad():
                outputs = _outputs(model.train(training), inputs, name)
            found = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            if found != expected:
                when = " while it is trained" if training else ""
                raise InputError(
                    f"model {name} gives {found} for inputs {list(inputs.shape)}{when}; expected {expected}, {meaning}"
                )
            if outputs.is_complex():
                raise InputError(f"model {name} gives complex numbers; expected real ones, {meaning}")
    finally:
        model.train(mode)


def take_one(config: Config, model: nn.Module, sample: Tensor, which: str) -> None:
    """Raise InputError where the model, in the mode it is in, takes no example alone; ``which`` says where one comes alone.

    sample: one example. Buffers and random numbers are left as they were.
    """
    try:
        with Pinned(model, sample.device).unchanged(), torch.no_grad():
            model(sample)
    except ValueError as error:  # a BatchNorm
        said = " ".join(str(error).split())
        raise InputError(f"{which}, which model {config.model.name} cannot take ({said}); choose another") from None


def one_in_a_shard(section: Data) -> str:
    """What leaves one example, for :func:`take_one`."""
    return f"data.shards = {section.shards}: leaves one example of data.batch_size = {section.batch_size} in each part"


def _outputs(model: nn.Module, inputs: Tensor, name: str) -> object:
    try:
        return model(inputs)
    except DzhpcError:
        raise
    except Exception as error:  # the user's forward may raise anything
        said = " ".join(str(error).split())
        when = " while it is trained" if model.training else ""
        raise InputError(f"model {name} cannot take inputs {list(inputs.shape[1:])}{when}: {said}") from None
