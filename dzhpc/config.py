"""The input file: TOML -> validated sections. Every key is documented here, and printed by ``python -m dzhpc.info keys``.

Precedence: defaults < file < ``--set KEY=VALUE``. The defaults are those of ``inputs/resnet20.toml``.
"""

import datetime
import difflib
import importlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dzhpc.errors import InputError

FROZEN = ("task", "model", "data", "zo", "sparsity", "optim", "stop.epochs", "run.seed")
FREE = ("data.root", "task.retries", "task.max_queries")
SYNONYMS = {  # what other codes call a key, where spelling alone would not find it
    "step_size": "zo.mu", "smoothing": "zo.mu", "epsilon": "zo.mu", "eps": "zo.mu", "learning_rate": "optim.lr",
    "batchsize": "data.batch_size", "optimizer": "optim.name", "epochs": "stop.epochs", "sparsity": "sparsity.ratio",
    "network": "model.name", "dataset": "data.name", "queries": "zo.q",
}  # fmt: skip


def _seconds(value: Any) -> Any:
    """Seconds from a number, "H:MM:SS", or a TOML local time."""
    if isinstance(value, datetime.time):
        return value.hour * 3600.0 + value.minute * 60 + value.second
    if isinstance(value, str) and value.count(":") in (1, 2) and all(part.isdigit() for part in value.split(":")):
        hours, minutes, seconds = ([0, 0, 0] + [int(part) for part in value.split(":")])[-3:]
        return hours * 3600.0 + minutes * 60 + seconds
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A table of the input file: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Run(Section):
    """Where and how the job runs; free on restart, but for the seed."""

    name: str | None = Field(None, description="the run folder's name; None: the input file's name")
    dir: str = Field("runs", description="the folder in which run folders lie")
    seed: int = Field(0, ge=0, description="every random number is a function of (seed, purpose, step)")
    threads: Count = Field(1, description="CPU threads per rank; bits may differ between thread counts")
    share_gpu: bool = Field(False, description="let several ranks use one GPU; otherwise that is an error")
    mixed_nodes: bool = Field(False, description="let ranks differ in processor type or compiler, and so in bits; else an error")
    deadline_margin: Seconds = Field(120.0, description="stop this long before SLURM_JOB_END_TIME, in seconds or H:MM:SS")
    check_every: Count = Field(100, description="compare a hash of all replicated state over the ranks every so many steps")


class Task(Section):
    """What is trained."""

    kind: Literal["classification", "objective", "defense", "sol"] = Field(
        "classification",
        description="a network on labelled images, the user's own loss of a parameter vector, a denoiser before a black box, or "
        "the correction of a coarse solver",
    )
    function: str | None = Field(None, description='objective: "package.module:Name" with initial() and __call__(thetas, step)')
    batch_limit: Count = Field(1024, description="objective, defense, sol: the most thetas, images or states in one call")
    classifier: str | None = Field(
        None,
        description='defense: the black box: "package.module:function", numpy images [N, 3, H, W] in [0, 1] -> logits or '
        "probabilities [N, K]; or a checkpoint, a run folder (its newest), a torch state_dict",
    )
    classifier_model: str | None = Field(None, description="defense: the network of a torch state_dict, as in model.name")
    classifier_mean: list[float] | None = Field(
        None, description="defense: normalisation inside a classifier from a file; None: the data set's own"
    )
    classifier_std: list[float] | None = Field(None, description="defense: see classifier_mean")
    sigma: Positive = Field(0.25, description="defense: the standard deviation of the noise, for pixels in [0, 1]")
    loss: Literal["classifier", "mse"] = Field(
        "classifier",
        description="defense: cross entropy of the classifier's answers with and without noise (A2), or |D(x + noise) - x|^2",
    )
    simulator: str = Field(
        "projected",
        description="sol: the coarse solver: projected (PhiFlow's step, its pressure operator factorised once), phiflow, or "
        '"package.module:function", numpy states [N, ...] and parameters [N] -> the next states',
    )
    unroll: Count = Field(16, description="sol: steps of corrected solver in the loss (A3); 1: pre-generated pairs (NON)")
    resolution: Count = Field(32, description="sol, wake: cells across the coarse solver's domain, twice as many along")
    factor: Count = Field(4, description="sol, wake: how many times finer the reference is")
    radius: Positive = Field(10.0, description="sol, wake: of the rod, in a domain of 100 x 200")
    frames: Annotated[int, Field(ge=2)] = Field(500, description="sol, simulate: the last so many states are kept")
    warm_up: int = Field(1000, ge=0, description="sol, simulate: states before those that are kept")
    train_parameters: list[float] = Field(
        [160e3 * 2**i for i in range(6)], description="sol, simulate: the training simulations'; the wake's is 1e4 / viscosity"
    )
    valid_parameters: list[float] = Field([640e3 * 2**0.5], description="sol, simulate: of those that choose the model")
    test_parameters: list[float] = Field([240e3 * 2**i for i in range(5)], description="sol, simulate: the test simulations'")
    reference: str | None = Field(
        None,
        description='sol, simulate: "package.module:function", parameter -> the reference states [warm_up + frames, ...] for an '
        "own simulator, on its grid",
    )
    retries: int = Field(
        3, ge=0, description="black box: ask again so often where a call raises, after 1, 2, 4, ... s; then stop (exit 6)"
    )
    max_queries: Annotated[int, Field(ge=1)] | None = Field(
        None, description="black box: end the run (exit 0) before what would ask it more often than this"
    )


class Model(BaseModel):
    """The network. Further keys are its constructor's own arguments (depth, width, classes, ...)."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str = Field(
        "resnet20", description='cnn, resnet20, resnet56, resnet18, vit-tiny, dncnn, ae-ds, corrector, or "package.module:Class"'
    )
    weights: str | None = Field(None, description="start from a checkpoint, a run folder (its newest), or a torch state_dict")
    trainable: list[str] | None = Field(
        None, description='train only parameters whose names match one of these patterns, e.g. ["model.38.*"]; the others stay'
    )

    @property
    def fields(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self.model_extra or {})


class Data(Section):
    """The data set. Root: this key, else $DZHPC_DATA, else data/."""

    name: str = Field(
        "cifar10",
        description='digits, cifar10, imagefolder, packed, or "package.module:function"; sol: NAME.h5, made by `simulate`',
    )
    root: str | None = Field(None, description="the folder that holds <name>.h5 or <name>/; free on restart")
    path: str | None = Field(None, description="imagefolder, packed: the folder or file below the root")
    image_size: Annotated[int, Field(ge=1)] | None = Field(
        None, description="imagefolder: resize and centre-crop to this many pixels"
    )
    batch_size: Count = Field(512, description="images (sol: windows) per step; every rank sees the same batch")
    train_limit: Annotated[int, Field(ge=1)] | None = Field(
        None, description="train on a random subset of this many images (sol: windows)"
    )
    test_limit: Annotated[int, Field(ge=1)] | None = Field(
        None, description="evaluate on this many images, evenly spaced over the test set"
    )
    augment: bool = Field(True, description="random crop (zero padding of 4 pixels) and horizontal flip")
    mean: list[float] | None = Field(
        None, description="normalisation per channel, for pixels in [0, 1]; None: the data set's own"
    )
    std: list[float] | None = Field(None, description="normalisation per channel, for pixels in [0, 1]; None: the data set's own")


class Zo(Section):
    """The gradient estimate."""

    estimator: Literal["cge", "rge", "autograd", "latent"] = Field(
        "cge",
        description="coordinate-wise, random directions, first-order, or (defense, model ae-ds) coordinate-wise on the code of "
        "an autoencoder and the chain rule before it",
    )
    engine: Literal["full", "reuse", "delta"] = Field(
        "delta", description="how differences are evaluated; objectives have their own"
    )
    mu: Positive = Field(5e-3, description="smoothing parameter: the length of a perturbation")
    q: Annotated[int, Field(ge=1)] | None = Field(
        None, description="rge: directions per step; None: the number of active coordinates"
    )
    difference: Literal["forward", "central"] = Field("forward", description="central costs two queries a coordinate")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="delta: the dtype in which changes travel; statistics and losses stay fp32"
    )
    memory_mb: Positive | None = Field(
        None, description="reuse: refuse a batch whose features need more MiB; delta: for a chunk's changes"
    )


class Sparsity(Section):
    """Which coordinates are perturbed."""

    ratio: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="the fraction of prunable weights that is pruned")
    target: Literal["gradients", "weights"] = Field(
        "gradients", description="prune the gradient, or the weights themselves (static)"
    )
    scores: Literal["zo-grasp", "fo-grasp", "random"] = Field(
        "zo-grasp", description="where the layer-wise pruning ratios come from"
    )
    rule: Literal["signed", "magnitude"] = Field(
        "signed",
        description="prune the largest signed scores (Wang et al. 2020), or keep the largest absolute ones (the authors' code)",
    )
    pattern: Literal["dynamic", "static", "regrasp"] = Field(
        "dynamic", description="redraw S by the ratios; keep the first (M2); score anew at every redraw (M1)"
    )
    prune: Literal["weights", "all"] = Field(
        "weights", description="conv and linear weights only (others stay active), or every parameter"
    )
    redraw_epochs: Count = Field(5, description="K_sparse: draw a new S every so many epochs")
    redraw_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="draw a new S every so many steps instead")
    q: Count = Field(192, description="zo-grasp: directions per RGE")
    lpr: str | None = Field(None, description="read the ratios from this file (python -m dzhpc.prune) instead of scoring")


class Optim(Section):
    """The optimiser (torch.optim) and its learning-rate schedule, evaluated at every step."""

    name: Literal["sgd", "adam"] = Field("sgd", description="torch.optim.SGD or Adam")
    lr: Positive = Field(0.1, description="the peak learning rate")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="sgd")
    weight_decay: Annotated[float, Field(ge=0)] = Field(5e-4, description="L2, added to the gradient")
    nesterov: bool = Field(False, description="sgd")
    schedule: Literal["cosine", "step", "constant"] = Field("cosine", description="cosine ends at 0 after stop.epochs")
    warmup_epochs: Annotated[float, Field(ge=0)] = Field(3.0, description="linear from 0 to lr")
    milestones: list[float] = Field([], description="step: the epochs at which lr is multiplied by gamma")
    gamma: Positive = Field(0.1, description="step: see milestones")


class Stop(Section):
    """When the run ends."""

    epochs: Positive = Field(50.0, description="the length of the run and of its schedule (an objective's epoch is one step)")
    steps: Annotated[int, Field(ge=1)] | None = Field(None, description="end early at this step; the schedule is unaltered")
    queries: Annotated[int, Field(ge=1)] | None = Field(None, description="end after the step that reaches this many queries")
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="end when an evaluation reaches it")
    walltime: Seconds | None = Field(None, description="stop (exit 75) this long after training began, in seconds or H:MM:SS")


class Checkpoint(Section):
    """When the state is written; a final checkpoint always is."""

    every_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="write every so many steps")
    every_minutes: Positive = Field(10.0, description="write when the last one is this old")
    keep: Annotated[int, Field(ge=2)] = Field(3, description="how many of the newest files stay")
    on_full: Literal["stop", "continue"] = Field(
        "stop", description="a checkpoint that cannot be written (disk full) ends the run (exit 3), or is left out with a warning"
    )


class Eval(Section):
    """Evaluation on the test set; a final one is always made."""

    every_epochs: Count = Field(1, description="evaluate every so many epochs")
    batch_size: Count = Field(1000, description="test images in one forward pass; ranks share the passes")


class Config(Section):
    """All sections of one input file."""

    run: Run = Run()
    task: Task = Task()
    model: Model = Model()
    data: Data = Data()
    zo: Zo = Zo()
    sparsity: Sparsity = Sparsity()
    optim: Optim = Optim()
    stop: Stop = Stop()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()

    def to_toml(self) -> str:
        """The resolved input; unset keys are left out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def load(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Read an input file and apply ``KEY=VALUE`` overrides.

    Raises InputError with file, key, value found and what was expected.
    """
    source = str(path) if path else "defaults"
    table = _read(Path(path)) if path else {}
    from_command_line = set()
    for text in overrides or []:
        key, equals, value = text.partition("=")
        if not equals or key.count(".") != 1:
            raise InputError(f"--set {text}: expected SECTION.KEY=VALUE, for example --set zo.mu=1e-3")
        section, name = key.strip().split(".")
        if not isinstance(table.setdefault(section, {}), dict):
            raise InputError(f"{source}: {section} must be a [section]")
        table[section][name] = _value(value.strip())
        from_command_line.add((section, name))
    config = parse(table, source, from_command_line)
    if config.run.name is None:
        config.run.name = Path(path).stem if path else config.model.name
    return config


def parse(table: dict[str, Any], source: str, from_command_line: set | frozenset = frozenset()) -> Config:
    """Validate a table of sections; raises InputError that names ``source`` and the first key at fault."""
    try:
        config = Config.model_validate(table)
    except ValidationError as failure:
        # an unknown key is usually the cause of the others, so it is named first
        error = min(failure.errors(), key=lambda e: e["type"] != "extra_forbidden")
        at_fault = error["loc"][:2]  # a key, or a section alone
        where = "--set" if any(place[: len(at_fault)] == at_fault for place in from_command_line) else source
        raise InputError(f"{where}: {_explain(error)}") from None
    for fault in _conflicts(config):
        raise InputError(f"{source}: {fault}")
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML input file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"][:2])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}{_suggestion(key)} (`python -m dzhpc.info keys` lists every key)"
    expected = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    found = error["input"]
    return f"{key} = {found!r}: expected {expected}" if not isinstance(found, dict) else f"{key}: expected {expected}"


def _suggestion(key: str) -> str:
    known = [name for name, _, _ in known_keys()]
    last = key.split(".")[-1]
    same_name = [name for name in known if name.split(".")[-1] == last]
    near = difflib.get_close_matches(key, [*known, *Config.model_fields], n=1, cutoff=0.7)
    near_name = [n for n in known if difflib.SequenceMatcher(None, n.split(".")[-1], last).ratio() > 0.75]
    best = [*([SYNONYMS[last]] if last in SYNONYMS else []), *same_name, *near, *near_name]
    return f"; did you mean {best[0]}?" if best else ""


def _conflicts(config: Config) -> Iterator[str]:
    """Keys that are each valid but not together."""
    task, zo, sparsity, optim = config.task, config.zo, config.sparsity, config.optim
    if sparsity.target == "weights" and sparsity.pattern != "static":
        yield f'sparsity.pattern = "{sparsity.pattern}": sparsity.target = "weights" needs "static"'
    if sparsity.pattern == "regrasp" and sparsity.lpr:
        yield 'sparsity.lpr: a fixed file contradicts pattern = "regrasp", which scores anew; remove one of them'
    if optim.nesterov and (optim.name != "sgd" or optim.momentum == 0):
        yield 'optim.nesterov = true: needs name = "sgd" and a momentum above 0'
    if optim.schedule == "step" and not optim.milestones:
        yield 'optim.schedule = "step": needs optim.milestones, the epochs at which lr drops'
    if zo.precision != "fp32" and zo.engine != "delta":
        yield f'zo.precision = "{zo.precision}": only zo.engine = "delta" has it'
    if task.kind == "objective":
        if not task.function:
            yield 'task.kind = "objective": needs task.function = "package.module:Name"'
        if zo.estimator == "autograd" or (sparsity.scores == "fo-grasp" and sparsity.ratio > 0):
            yield 'task.kind = "objective": has no autograd; use zo.estimator cge or rge, sparsity.scores zo-grasp or random'
    elif task.function:
        yield 'task.function: belongs to task.kind = "objective"'
    if task.kind == "classification" and task.max_queries:
        yield f"task.max_queries = {task.max_queries}: belongs to a task with a black box; use stop.queries"
    if zo.estimator == "latent" and (task.kind != "defense" or task.loss != "classifier" or zo.difference == "central"):
        yield 'zo.estimator = "latent": needs task.kind = "defense", task.loss = "classifier", zo.difference = "forward"'
    if task.kind == "sol":
        own = is_function(task.simulator)
        if not own and task.simulator not in ("projected", "phiflow"):
            yield f'task.simulator = "{task.simulator}": expected projected, phiflow or "package.module:function"'
        if own and zo.estimator == "autograd" and task.unroll > 1:
            yield f"task.simulator = {task.simulator}: a function has no autograd; use cge or rge, or task.unroll = 1"
        if zo.engine == "reuse" or zo.precision != "fp32":
            yield 'task.kind = "sol": needs zo.engine = "delta" or "full", and zo.precision = "fp32"'
    if task.kind != "defense":
        if task.classifier:
            yield 'task.classifier: belongs to task.kind = "defense"'
    elif task.loss == "classifier":
        if not task.classifier:
            yield 'task.kind = "defense": needs task.classifier = "package.module:function" or a file of weights'
        first_order = zo.estimator == "autograd" or (sparsity.scores == "fo-grasp" and sparsity.ratio > 0)
        if first_order and is_function(task.classifier):
            yield f"task.classifier = {task.classifier}: a function has no autograd; use zo.estimator cge or rge, no fo-grasp"


def known_keys() -> Iterator[tuple[str, Any, str]]:
    """(dotted key, default, meaning) of every key, in the order of the sections."""
    for section, info in Config.model_fields.items():
        for name, field in info.annotation.model_fields.items():
            yield f"{section}.{name}", field.default, field.description or ""


def frozen_changes(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of frozen keys that differ; those must not change on restart."""
    a, b = _flatten(old), _flatten(new)
    frozen = (key for key in [*a, *(set(b) - set(a))] if key.startswith(FROZEN) and key not in FREE)
    return [(key, a.get(key), b.get(key)) for key in frozen if a.get(key) != b.get(key)]


def _flatten(config: Config) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, table in config.model_dump().items() for key, value in table.items()}


def is_function(name: str) -> bool:
    """Whether a name is that of a Python object, ``package.module:Name``, rather than of a file."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def import_object(name: str, key: str) -> Any:
    """The object behind ``package.module:Name``, looked up on sys.path and in the working directory.

    Raises InputError that names ``key`` if the module or the name does not exist.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise InputError(f'{key} = "{name}": expected "package.module:Name"')
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, ValueError) as error:
        raise InputError(
            f'{key} = "{name}": cannot import {module} ({error}); expected "package.module:Name" on the Python path'
        ) from None
    except AttributeError:
        raise InputError(f'{key} = "{name}": module {module} has no {attribute!r}') from None
