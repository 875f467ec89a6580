"""The section [task], one class for each ``task.kind``; a key lies with the kinds that have it, and so do its checks.

The keys stay flat in [task]: the kind says already whose they are, ``--set`` takes one dot, and old input files go on working.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from dzhpc.config.names import is_function
from dzhpc.config.rivals import FIRST_ORDER
from dzhpc.config.values import LARGEST, Count, Finite, Moderate, Pixels, Positive, Seconds, Section, Total

OWN = "package.module:Class"
PROGRAMS = ("template", "input", "result", "pattern", "pointer", "concurrency", "scratch")  # which need a command
INFEASIBLE = Field([], description="command: exit codes that call a perturbed theta infeasible: it stays out of the step")
BATCHED = Field(False, description="command: a call answers up to task.batch_limit inputs [N, ...], which task.input has")
MAX_QUERIES = Field(None, description="end the run (exit 0) before what would ask the black box more often than this")


class TaskKeys(Section):
    """What all kinds have."""

    kind: str

    @property
    def fields(self) -> dict[str, Any]:
        """Keys of a class of the user's own."""
        return dict(self.model_extra or {})

    def conflicts(self, config) -> Iterator[str]:
        """See :class:`Section`."""
        if config is not None and config.zo.estimator == "latent":
            yield 'zo.estimator = "latent": needs task.kind = "defense", task.loss = "classifier", zo.difference = "forward"'


class BlackBoxKeys(TaskKeys):
    """What the kinds have that ask a black box."""

    batch_limit: Count = Field(1024, description="the most thetas, images or states in one call")
    retries: int = Field(
        3, ge=0, le=LARGEST, description="ask again so often where a call raises, after 1, 2, 4, ... s; then stop (exit 6)"
    )
    max_queries: Total | None = MAX_QUERIES
    timeout: Seconds | None = Field(
        None,
        description="the time that a call may take, then it is killed; a Python function with one runs in a process of its own. "
        "None: an hour for a program, any for a function",
    )
    command: list[str] | None = Field(
        None, description='the black box is a program: its words, for example ["solver", "{folder}/case.in"], run for each query'
    )
    template: str | list[str] | None = Field(
        None, description="command: files or folders that each call finds in its folder, with {name} replaced by numbers"
    )
    input: str | None = Field(
        None, description="command: a file in its folder that is given all numbers by name (.json, .h5) or one array (.npy)"
    )
    result: str = Field(
        "stdout.txt",
        description='command: the file in its folder that holds the answer, or "package.module:function" of the folder',
    )
    pattern: str | None = Field(
        None, description="command: a regular expression with one group for a number; one answer: the last match in the result"
    )
    pointer: str | None = Field(None, description='command: where the answer is in a JSON result, for example "/loss" (RFC 6901)')
    concurrency: Count = Field(1, description="command: the programs that a rank runs at once")
    scratch: str | None = Field(None, description="command: in which the folders of the calls are made; None: $TMPDIR, or /tmp")

    def conflicts(self, config) -> Iterator[str]:
        """See :class:`Section`."""
        yield from super().conflicts(config)
        if self.command is None:
            for name in (*PROGRAMS, "infeasible", "initial", "units", "residuals", "batched"):
                if name in type(self).model_fields and getattr(self, name) != type(self).model_fields[name].default:
                    yield f"task.{name}: belongs to task.command"
            return
        if getattr(self, "batched", False) and not self.input:
            yield 'task.batched: needs task.input = "NAME.npy", ".json" or ".h5"'
        if not self.command or not self.command[0]:
            yield "task.command = []: expected a program and its arguments"
        if self.pointer and not self.pointer.startswith("/"):
            yield f'task.pointer = "{self.pointer}": expected "/{self.pointer}"'
        if self.pattern is not None and self.pointer is not None:
            yield "task.pattern and task.pointer: expected one of them"
        if is_function(self.result) and (self.pattern is not None or self.pointer is not None):
            yield f"task.result = {self.result}: a function needs neither task.pattern nor task.pointer"
        for name, value in (("input", self.input), ("result", self.result)):
            if value and not is_function(value) and (value.startswith("/") or ".." in value.split("/")):
                yield f'task.{name} = "{value}": expected a file in the folder of the call'
        if self.input and not self.input.endswith((".npy", ".json", ".h5")):
            yield f'task.input = "{self.input}": expected a file .npy, .json or .h5'
        try:
            if self.pattern is not None and re.compile(self.pattern).groups != 1:
                yield f"task.pattern = {self.pattern!r}: expected one group (...), which holds the number"
        except re.error as error:
            yield f"task.pattern = {self.pattern!r}: no regular expression ({error})"


class ClassificationKeys(TaskKeys):
    """A network on labelled images."""

    kind: Literal["classification"] = Field("classification", description="a network on labelled images")
    loss: Literal["cross_entropy", "mse"] = Field("cross_entropy", description="or mse: squared distance to one-hot less 1/K")

    @property
    def max_queries(self) -> None:
        """Nobody counts what a network of our own is asked; see stop.queries."""


class ObjectiveKeys(BlackBoxKeys):
    """The user's own loss of a parameter vector."""

    kind: Literal["objective"] = Field("objective", description="the user's own loss of a parameter vector")
    function: str | None = Field(None, description='"package.module:Name" with initial() and __call__(thetas, step)')
    initial: dict[str, Any] | str | None = Field(
        None, description='command: theta0: a table of named numbers or lists, a .npy or .json file, or "package.module:function"'
    )
    units: dict[str, Positive] = Field(
        {}, description="command: what is written is theta times its unit, so that all of theta is of the size of 1"
    )
    infeasible: list[Annotated[int, Field(ge=1, le=255)]] = INFEASIBLE
    residuals: Count | None = Field(None, description="command: the answer is so many residuals; the loss is their mean square")

    def conflicts(self, config) -> Iterator[str]:
        if bool(self.function) == bool(self.command):
            yield 'task.kind = "objective": needs task.function = "package.module:Name" or task.command, not both'
        if self.command and self.initial is None:
            yield "task.command: needs task.initial, the parameters' names and starting values"
        if first_order(config):
            yield 'task.kind = "objective": has no autograd; use zo.estimator cge or rge, sparsity.scores zo-grasp or random'
        yield from super().conflicts(config)


class DefenseKeys(BlackBoxKeys):
    """A denoiser before a classifier that may only be asked."""

    kind: Literal["defense"] = Field("defense", description="a denoiser before a classifier that may only be asked")
    classifier: str | None = Field(
        None,
        description='the black box: "package.module:function", numpy images [N, 3, H, W] in [0, 1] -> logits or probabilities '
        "[N, K]; or a checkpoint, a run folder (its newest), a torch state_dict",
    )
    classifier_model: str | None = Field(None, description="the network of a torch state_dict, as in model.name")
    classifier_mean: list[Finite] | None = Field(
        None, description="normalisation inside a classifier from a file; None: the data set's own"
    )
    classifier_std: list[Positive] | None = Field(None, description="see classifier_mean")
    batched: bool = BATCHED
    sigma: Moderate = Field(0.25, description="the standard deviation of the noise, for pixels in [0, 1]")
    loss: Literal["classifier", "mse"] = Field(
        "classifier",
        description="cross entropy of the classifier's answers with and without noise (A2), or |D(x + noise) - x|^2",
    )

    @property
    def box(self) -> str:
        """What errors call the classifier; "" without one."""
        if self.command:
            return f"task.command = {self.command[0]}"
        return f"task.classifier = {self.classifier}" if self.classifier else ""

    def conflicts(self, config) -> Iterator[str]:
        """See :class:`Section`."""
        latent = config.zo.estimator == "latent" and self.loss == "classifier" and config.zo.difference != "central"
        yield from BlackBoxKeys.conflicts(self, None if latent else config)
        if self.classifier and self.command:
            yield "task.classifier and task.command: expected one of them"
        if self.loss == "classifier" and not self.classifier and not self.command:
            yield 'task.kind = "defense": needs task.classifier = "package.module:function" or a file of weights, or task.command'
        if self.loss == "classifier" and first_order(config) and self.command:
            yield "task.command: a program has no autograd; use zo.estimator cge or rge, no fo-grasp"
        if self.loss == "classifier" and first_order(config) and is_function(self.classifier):
            yield f"task.classifier = {self.classifier}: a function has no autograd; use zo.estimator cge or rge, no fo-grasp"


class SolKeys(BlackBoxKeys):
    """A network that corrects a coarse solver at every step."""

    kind: Literal["sol"] = Field("sol", description="a network that corrects a coarse solver at every step")
    simulator: str = Field(
        "projected",
        description="the coarse solver: projected (PhiFlow's step, its pressure operator factorised once), phiflow, or "
        '"package.module:function", numpy states [N, ...] and parameters [N] -> the next states',
    )
    infeasible: list[Annotated[int, Field(ge=1, le=255)]] = INFEASIBLE
    batched: bool = BATCHED
    unroll: Count = Field(16, description="steps of corrected solver in the loss (A3); 1: pre-generated pairs (NON)")
    resolution: Pixels = Field(32, description="wake: cells across the coarse solver's domain, twice as many along")
    factor: Pixels = Field(4, description="wake: how many times finer the reference is")
    radius: Positive = Field(10.0, description="wake: of the rod, in a domain of 100 x 200")
    frames: Annotated[int, Field(ge=2, le=LARGEST)] = Field(500, description="simulate: the last so many states are kept")
    warm_up: int = Field(1000, ge=0, le=LARGEST, description="simulate: states before those that are kept")
    train_parameters: list[Finite] = Field(
        [160e3 * 2**i for i in range(6)], description="simulate: the training simulations'; the wake's is 1e4 / viscosity"
    )
    valid_parameters: list[Finite] = Field([640e3 * 2**0.5], description="simulate: of those that choose the model")
    test_parameters: list[Finite] = Field([240e3 * 2**i for i in range(5)], description="simulate: the test simulations'")
    reference: str | None = Field(
        None,
        description='simulate: "package.module:function", parameter -> the reference states [warm_up + frames, ...] for an own '
        "simulator, on its grid",
    )

    @property
    def is_own(self) -> bool:
        """Whether the solver is the user's, a function or a program."""
        return bool(self.command) or is_function(self.simulator)

    @property
    def box(self) -> str:
        """What errors call the solver."""
        return f"task.command = {self.command[0]}" if self.command else f"task.simulator = {self.simulator}"

    def conflicts(self, config) -> Iterator[str]:
        """See :class:`Section`."""
        own = self.is_own
        if self.command and self.simulator != "projected":
            yield f"task.simulator = {self.simulator}: task.command is the simulator; remove one of them"
        if not own and self.simulator not in ("projected", "phiflow"):
            yield f'task.simulator = "{self.simulator}": expected projected, phiflow or "package.module:function"'
        if own and config.zo.estimator == "autograd" and self.unroll > 1:
            yield f"{self.box}: has no autograd; use cge or rge, or task.unroll = 1"
        if config.zo.engine == "reuse" or config.zo.precision != "fp32":
            yield 'task.kind = "sol": needs zo.engine = "delta" or "full", and zo.precision = "fp32"'
        yield from super().conflicts(config)


class OwnKeys(TaskKeys):
    """A class of the user's own, derived from dzhpc.tasks.Task. Further keys are its constructor's own arguments."""

    model_config = ConfigDict(extra="allow", strict=True)
    kind: str = Field(OWN, description="a class derived from dzhpc.tasks.Task; further keys are its constructor's arguments")
    max_queries: Total | None = MAX_QUERIES

    def conflicts(self, config) -> Iterator[str]:
        """What an own class can do, it knows itself."""
        return iter(())


KINDS: dict[str, type[TaskKeys]] = {
    "classification": ClassificationKeys, "objective": ObjectiveKeys, "defense": DefenseKeys, "sol": SolKeys, OWN: OwnKeys,
}  # fmt: skip


def tag(value: Any) -> str:
    """The entry of KINDS that a table of [task] belongs to."""
    kind = value.get("kind", "classification") if isinstance(value, dict) else getattr(value, "kind", "classification")
    return OWN if isinstance(kind, str) and is_function(kind) else str(kind)


AnyTask = Annotated[
    Annotated[ClassificationKeys, Tag("classification")]
    | Annotated[ObjectiveKeys, Tag("objective")]
    | Annotated[DefenseKeys, Tag("defense")]
    | Annotated[SolKeys, Tag("sol")]
    | Annotated[OwnKeys, Tag(OWN)],
    Discriminator(tag),
]


def belongs_to(name: str) -> list[str]:
    """The kinds that have a key of this name."""
    return [kind for kind, keys in KINDS.items() if name in keys.model_fields]


def foreign(table: dict[str, Any]) -> list[str]:
    """The keys of a table of [task] that only other kinds have; a class of the user's own may have any."""
    own = KINDS.get(tag(table), OwnKeys)
    return [] if own is OwnKeys else [name for name in table if not _has(own, name, table[name]) and belongs_to(name)]


def _has(keys: type[TaskKeys], name: str, value: Any) -> bool:  # 0.1 wrote a defence's loss = "classifier" for all kinds
    return name in keys.model_fields and not (keys is ClassificationKeys and name == "loss" and value == "classifier")


def idle(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys of a file's table ``old`` of [task] that say nothing where ``new``, with the command line's keys, holds.

    Those of the file's own kind, where the command line names another; and those of other kinds that are at their default: 0.1
    wrote the keys of all kinds into a run folder's input.toml.
    """
    before, after = (KINDS.get(tag(table), TaskKeys) for table in (old, new))
    replaced = old.get("kind", "classification") != new.get("kind", "classification")

    def says_nothing(name: str) -> bool:
        if replaced and (before is OwnKeys or name in before.model_fields):
            return True
        return after is not OwnKeys and any(old[name] == KINDS[kind].model_fields[name].default for kind in belongs_to(name))

    return [name for name in old if not _has(after, name, old[name]) and says_nothing(name)]


def first_order(config) -> bool:
    """Whether gradients by autograd are wanted, of the loss or for scores."""
    scores = config.sparsity.scores == "fo-grasp" and config.sparsity.ratio > 0
    return scores or config.zo.estimator in FIRST_ORDER
