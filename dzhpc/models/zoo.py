"""Networks: ours by name, the user's by ``package.module:Class``; building, starting weights, loading checkpoints."""

import fnmatch
import inspect
import pickle
from pathlib import Path

import torch

from dzhpc import config as configuration
from dzhpc.errors import CheckpointError, InputError
from dzhpc.files import store
from dzhpc.files.runfolder import load_state
from dzhpc.method.seeds import derive
from dzhpc.models.ae_ds import DenoisedAutoencoder
from dzhpc.models.cnn import SimpleCNN
from dzhpc.models.corrector import Corrector
from dzhpc.models.dncnn import DnCNN
from dzhpc.models.resnet import resnet18, resnet20, resnet56
from dzhpc.models.vit import ViT

MODELS = {
    "cnn": SimpleCNN,
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
    try:
        parameters = inspect.signature(constructor(section)).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(f'model.name = "{section.name}": {error}; expected a torch.nn.Module class') from None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}


def fill_in(section: configuration.Model, **values: int) -> None:
    """Arguments that follow from the data (classes, channels), where the model takes them and the input leaves them out."""
    known = accepted(section)
    for key, value in values.items():
        if key not in section.fields and (known is None or key in known):
            section.__pydantic_extra__[key] = value


def build(section: configuration.Model, seed: int) -> torch.nn.Module:
    """The network with weights drawn from ``seed``, or those of ``model.weights``. Raises InputError."""
    known = accepted(section)
    unknown = sorted(set(section.fields) - known) if known is not None else []
    if unknown:
        raise InputError(f"unknown key model.{unknown[0]}; model {section.name} takes {', '.join(sorted(known)) or 'none'}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        try:
            model = constructor(section)(**section.fields)
        except (TypeError, ValueError) as error:
            raise InputError(f"[model] {section.name}: {error}") from None
    if not isinstance(model, torch.nn.Module):
        raise InputError(f'model.name = "{section.name}": gave a {type(model).__name__}, expected a torch.nn.Module')
    if section.weights:
        load_weights(model, section.weights)
    if section.trainable is not None:
        _freeze_others(model, section.trainable)
    return model


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


def load_weights(model: torch.nn.Module, path: str) -> None:
    """Copy the weights in ``path``: a checkpoint or run folder of ours, or a torch state_dict.

    The latter may lie under "state_dict" and have names with "module.". Raises InputError.
    """
    try:
        if is_ours(path):
            _, state = load_state(path)
            assign(_part_for(model, {**state.params, **state.buffers}), state.params, state.buffers)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            weights = weights.get("state_dict", weights)
            weights = {name.removeprefix("module."): value for name, value in weights.items()}
            _part_for(model, weights).load_state_dict(weights)
    except OSError as error:
        raise InputError(f"model.weights = {path}: cannot be read ({error.strerror or error})") from None
    except CheckpointError as error:
        raise InputError(f"model.weights = {path}: {error}") from None
    except (RuntimeError, pickle.UnpicklingError, AttributeError, TypeError, EOFError) as error:
        raise InputError(
            f"model.weights = {path}: does not fit {type(model).__name__}: {' '.join(str(error).split())[:300]}"
        ) from None


def _part_for(model: torch.nn.Module, weights: dict) -> torch.nn.Module:
    """The denoiser inside a model, where the weights are a denoiser's alone; else the model."""
    inner = getattr(model, "denoiser", None)
    return inner if isinstance(inner, torch.nn.Module) and set(weights) == set(inner.state_dict()) else model


def is_ours(path: str | Path) -> bool:
    """Whether this is a run folder, or begins like a checkpoint of ours. Raises OSError."""
    return Path(path).is_dir() or store.is_ours(path)


def config_of(state: store.State, source: str) -> configuration.Config:
    """The input that a checkpoint was written with. Raises CheckpointError if this program does not understand it."""
    try:
        return configuration.parse_written(state.config, source)
    except InputError as error:
        raise CheckpointError(f"{error}; it was written by another version of dzhpc") from None


def load_model(checkpoint: str | Path) -> torch.nn.Module:
    """The trained network of a checkpoint, or of a run folder's newest, in eval mode, on the CPU.

    ``.state_dict()`` of it is a plain torch one. Raises CheckpointError if the file is missing or damaged, or was written by a
    task without a network.
    """
    file, state = load_state(checkpoint)
    config = config_of(state, file)
    if config.task.kind == "objective":
        raise CheckpointError(
            f"{checkpoint}: task.kind = {config.task.kind} has no network; see dzhpc.files.store.load_checkpoint(...).params"
        )
    config.model.weights = None
    model = build(config.model, state.seed)
    assign(model, state.params, state.buffers)
    return model.eval()


@torch.no_grad()
def assign(model: torch.nn.Module, params: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> None:
    """Copy a checkpoint's tensors into the model, tied and non-persistent ones included.

    Raises CheckpointError if they differ in name or shape.
    """
    for kind, own, given in (
        ("parameter", dict(model.named_parameters()), params),
        ("buffer", dict(model.named_buffers()), buffers),
    ):
        wrong = sorted(
            name
            for name in own.keys() | given.keys()
            if name not in own or name not in given or own[name].shape != given[name].shape
        )
        if wrong:
            raise CheckpointError(f"the checkpoint is of another model: {kind} {wrong[0]} differs ({len(wrong)} in all)")
        for name, tensor in own.items():
            tensor.copy_(given[name])
