"""The section [task], one class for each ``task.kind``; a key lies with the kinds that have it, and so do its checks.

The keys stay flat in [task]: the kind says already whose they are, ``--set`` takes one dot, and old input files go on working.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from dzhpc.config.names import is_function
from dzhpc.config.sections import LARGEST, Count, Finite, Pixels, Positive, Section, Total

OWN = "package.module:Class"
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
        if config.zo.estimator == "latent":
            yield 'zo.estimator = "latent": needs task.kind = "defense", task.loss = "classifier", zo.difference = "forward"'


class BlackBoxKeys(TaskKeys):
    """What the kinds have that ask a black box."""

    batch_limit: Count = Field(1024, description="the most thetas, images or states in one call")
    retries: int = Field(
        3, ge=0, le=LARGEST, description="ask again so often where a call raises, after 1, 2, 4, ... s; then stop (exit 6)"
    )
    max_queries: Total | None = MAX_QUERIES


class ClassificationKeys(TaskKeys):
    """A network on labelled images."""

    kind: Literal["classification"] = Field("classification", description="a network on labelled images")

    @property
    def max_queries(self) -> None:
        """Nobody counts what a network of our own is asked; see stop.queries."""


class ObjectiveKeys(BlackBoxKeys):
    """The user's own loss of a parameter vector."""

    kind: Literal["objective"] = Field("objective", description="the user's own loss of a parameter vector")
    function: str | None = Field(None, description='"package.module:Name" with initial() and __call__(thetas, step)')

    def conflicts(self, config) -> Iterator[str]:
        """See :class:`Section`."""
        if not self.function:
            yield 'task.kind = "objective": needs task.function = "package.module:Name"'
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
    sigma: Positive = Field(0.25, description="the standard deviation of the noise, for pixels in [0, 1]")
    loss: Literal["classifier", "mse"] = Field(
        "classifier",
        description="cross entropy of the classifier's answers with and without noise (A2), or |D(x + noise) - x|^2",
    )

    def conflicts(self, config) -> Iterator[str]:
        """See :class:`Section`."""
        if config.zo.estimator == "latent" and (self.loss != "classifier" or config.zo.difference == "central"):
            yield from super().conflicts(config)
        if self.loss == "classifier" and not self.classifier:
            yield 'task.kind = "defense": needs task.classifier = "package.module:function" or a file of weights'
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

    def conflicts(self, config) -> Iterator[str]:
        """See :class:`Section`."""
        own = is_function(self.simulator)
        if not own and self.simulator not in ("projected", "phiflow"):
            yield f'task.simulator = "{self.simulator}": expected projected, phiflow or "package.module:function"'
        if own and config.zo.estimator == "autograd" and self.unroll > 1:
            yield f"task.simulator = {self.simulator}: a function has no autograd; use cge or rge, or task.unroll = 1"
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
    return [] if own is OwnKeys else [name for name in table if name not in own.model_fields and belongs_to(name)]


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

    return [name for name in old if name not in after.model_fields and says_nothing(name)]


def first_order(config) -> bool:
    """Whether gradients by autograd are wanted, of the loss or for scores."""
    return config.zo.estimator == "autograd" or (config.sparsity.scores == "fo-grasp" and config.sparsity.ratio > 0)
