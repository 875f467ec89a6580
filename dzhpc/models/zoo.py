"""Networks: ours by name, the user's by ``package.module:Class``; built anew, or trained, from a checkpoint."""

import fnmatch
import inspect
from pathlib import Path

import torch

from dzhpc import config as configuration
from dzhpc.errors import CheckpointError, InputError
from dzhpc.files.checkpoint import config_of
from dzhpc.files.runfolder import load_state
from dzhpc.method.seeds import derive
from dzhpc.models.ae_ds import DenoisedAutoencoder
from dzhpc.models.cnn import SimpleCNN
from dzhpc.models.corrector import Corrector
from dzhpc.models.dncnn import DnCNN
from dzhpc.models.mixer import LocalMixer
from dzhpc.models.resnet import resnet18, resnet20, resnet56
from dzhpc.models.rivals import CNN8, LeNet
from dzhpc.models.vit import ViT
from dzhpc.models.weights import assign, load_weights

MODELS = {
    "cnn": SimpleCNN,
    "cnn8": CNN8,
    "lenet": LeNet,
    "local-mixer": LocalMixer,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "resnet18": resnet18,
    "vit-tiny": ViT,
    "dncnn": DnCNN,
    "ae-ds": DenoisedAutoencoder,
    "corrector": Corrector,
}


def constructor(section: configuration.Model):
    """The callable behind ``model.name``. Raises InputError for an unknown one."""
    if ":" in section.name:
        return configuration.import_object(section.name, "model.name")
    if section.name not in MODELS:
        raise InputError(f'model.name = "{section.name}": expected {" | ".join(MODELS)} or "package.module:Class"')
    return MODELS[section.name]


def accepted(section: configuration.Model) -> set[str] | None:
    """The keys that the constructor takes; None if it takes any."""
    parameters = _parameters(section)
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}


def _parameters(section: configuration.Model) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(constructor(section)).parameters.values())
    except (TypeError, ValueError) as error:
        raise InputError(f'model.name = "{section.name}": {error}; expected a torch.nn.Module class') from None


def fill_in(section: configuration.Model, **values: int) -> None:
    """Arguments that follow from the data (classes, channels), where the model names them and the input leaves them out.

    Where it takes any (``**kwargs``) it gets none: it may pass them on to what does not know them.
    """
    named = {p.name for p in _parameters(section) if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for key, value in values.items():
        if key not in section.fields and key in named:
            setattr(section, key, value)


def build(section: configuration.Model, seed: int) -> torch.nn.Module:
    """The network with weights drawn from ``seed``, or those of ``model.weights``. Raises InputError."""
    known = accepted(section)
    unknown = sorted(set(section.fields) - known) if known is not None else []
    if unknown:
        raise InputError(f"unknown key model.{unknown[0]}; model {section.name} takes {', '.join(sorted(known)) or 'none'}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        model = configuration.called(f"[model] {section.name}", constructor(section), **section.fields)
    if not isinstance(model, torch.nn.Module):
        raise InputError(f'model.name = "{section.name}": gave a {type(model).__name__}, expected a torch.nn.Module')
    configuration.called(f"[model] {section.name}: train()", model.train)  # what torch.export makes has no modes
    _check_tensors(model, section.name)
    if section.weights:
        load_weights(model, section.weights)
    if section.trainable is not None:
        _freeze_others(model, section.trainable)
    return model


def _check_tensors(model: torch.nn.Module, name: str) -> None:
    """Raise InputError for parameters that have no shape yet, and for 16-bit numbers: theta + mu would be theta."""
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise InputError(f"model {name}: {key} lies on the device meta, so it has no numbers; build the model on the CPU")
        if torch.nn.parameter.is_lazy(tensor):
            raise InputError(f"model {name}: {key} has no shape yet (a lazy layer); give the layer its sizes")
        if tensor.is_floating_point() and tensor.itemsize < 4:
            raise InputError(f"model {name}: {key} is {str(tensor.dtype)[6:]}; expected float32 or float64 (call .float())")


def _freeze_others(model: torch.nn.Module, patterns: list[str]) -> None:
    """Frozen parameters have no coordinates. Raises InputError for a pattern that no parameter's name matches."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise InputError(f'model.trainable: no parameter matches "{pattern}"; the model has {_abridged(names)}')
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def _abridged(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 12 else [*names[:4], "...", *names[-4:]])


def load_model(checkpoint: str | Path) -> torch.nn.Module:
    """The trained network of a checkpoint, or of a run folder's newest, in eval mode, on the CPU.

    ``.state_dict()`` of it is a plain torch one. Raises CheckpointError if the file is missing or damaged, or was written by a
    task without a network.
    """
    file, state = load_state(checkpoint)
    config = config_of(state, file)
    if config.task.kind == "objective":
        raise CheckpointError(
            f"{checkpoint}: task.kind = {config.task.kind} has no network; see dzhpc.files.checkpoint.load_checkpoint(...).params"
        )
    config.model.weights = None
    model = build(config.model, state.seed)
    assign(model, state.params, state.buffers)
    return model.eval()
