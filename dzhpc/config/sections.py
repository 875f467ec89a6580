"""The sections of an input file but [task]: every key with its type, its default and its meaning."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from dzhpc.config import rivals
from dzhpc.config.names import is_function
from dzhpc.config.values import (
    LARGEST,
    Count,
    Decay,
    Directions,
    Epochs,
    Finite,
    Kept,
    Moderate,
    Pixels,
    Positive,
    Ratio,
    Seconds,
    Section,
    Seed,
    Threads,
    Total,
)

ESTIMATORS = ("cge", "rge", "fzoo", "autograd", "latent", "pattern", *rivals.SEE_THE_NETWORK)


def _estimator(value: str) -> str:
    if value in ESTIMATORS or is_function(value):
        return value
    names = ", ".join(f"'{name}'" for name in ESTIMATORS)
    raise PydanticCustomError("estimator", f"Input should be {names} or 'package.module:Class'")


class Run(Section):
    """Where and how the job runs; free on restart, but for the seed."""

    name: str | None = Field(None, description="the run folder's name; None: the input file's name")
    dir: str = Field("runs", description="the folder in which run folders lie")
    seed: Seed = Field(0, description="every random number is a function of (seed, purpose, step)")
    threads: Threads = Field(1, description="CPU threads per rank; bits may differ between thread counts")
    share_gpu: bool = Field(False, description="let several ranks use one GPU; otherwise that is an error")
    mixed_nodes: bool = Field(False, description="let ranks differ in processor type or compiler, and so in bits; else an error")
    take_over: bool = Field(
        False, description="within a step, ranks that are done take over what others have not begun: where queries differ in time"
    )
    deadline_margin: Seconds = Field(120.0, description="stop this long before SLURM_JOB_END_TIME, in seconds or H:MM:SS")
    check_every: Count = Field(100, description="compare a hash of all replicated state over the ranks every so many steps")


class Model(Section):
    """The network. Further keys are its constructor's own arguments (depth, width, classes, ...)."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str = Field(
        "resnet20",
        description="cnn, resnet20, resnet56, resnet18, vit-tiny, cnn8 (Table 1), lenet, local-mixer, dncnn, ae-ds, corrector, "
        'or "package.module:Class"',
    )
    weights: str | None = Field(None, description="start from a checkpoint, a run folder (its newest), or a torch state_dict")
    trainable: list[str] | None = Field(
        None, description='train only parameters whose names match one of these patterns, e.g. ["model.38.*"]; the others stay'
    )

    @property
    def fields(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self.model_extra or {})

    def conflicts(self, config) -> Iterator[str]:
        """See :class:`Section`."""
        for key in ("weights", "trainable"):
            if config.task.kind == "objective" and getattr(self, key) is not None:
                yield f'model.{key}: task.kind = "objective" has no model, and all of theta0 is trained; leave the key out'


class Data(Section):
    """The data set. Root: this key, else $DZHPC_DATA, else data/."""

    name: str = Field(
        "cifar10",
        description='digits, cifar10, imagefolder, packed, or "package.module:function"; sol: NAME.h5, made by `simulate`',
    )
    root: str | None = Field(None, description="the folder that holds <name>.h5 or <name>/; free on restart")
    path: str | None = Field(None, description="imagefolder, packed: the folder or file below the root")
    image_size: Pixels | None = Field(None, description="imagefolder: resize and centre-crop to this many pixels")
    batch_size: Count = Field(512, description="images (sol: windows) per step; every rank sees the same batch")
    shards: Count = Field(
        1, description="cut the batch into so many equal parts, which ranks may share; BatchNorm sees a part at a time"
    )
    train_limit: Count | None = Field(None, description="train on a random subset of this many images (sol: windows)")
    test_limit: Count | None = Field(None, description="evaluate on this many images, evenly spaced over the test set")
    augment: bool = Field(True, description="random crop (zero padding of 4 pixels) and horizontal flip")
    mean: list[Finite] | None = Field(
        None, description="normalisation per channel, for pixels in [0, 1]; None: the data set's own"
    )
    std: list[Positive] | None = Field(None, description="see mean")

    def conflicts(self, config) -> Iterator[str]:
        """See :class:`Section`."""
        if self.batch_size % self.shards:
            yield f"data.shards = {self.shards}: data.batch_size = {self.batch_size} is no multiple of it"
        if self.shards > 1 and config.task.kind in ("defense", "sol") and config.zo.estimator in ("autograd", "latent"):
            yield f'data.shards = {self.shards}: zo.estimator = "{config.zo.estimator}" has parts of its own for this task'


class Zo(Section):
    """The gradient estimate."""

    estimator: Annotated[str, AfterValidator(_estimator)] = Field(
        "cge",
        description="cge: coordinate-wise; rge: random directions; fzoo: rge over the standard deviation of its slopes; "
        "autograd: first-order; latent (defense, model ae-ds): coordinate-wise on the code of an autoencoder, and the chain rule "
        "before it; pattern: pattern search; rivals that see the network: fg-w, lg-fg-a (forward gradients), fa, dfa (random "
        'feedback), align-ada, align-zero (feedback by the starting weights); or "package.module:Class"',
    )
    engine: Literal["full", "reuse", "delta"] = Field(
        "delta",
        description="how differences are evaluated; objectives have their own; full where it is not named and the estimator is "
        "autograd or sees the network, since what the others keep of a batch is for coordinates",
    )
    mu: Moderate = Field(5e-3, description="smoothing parameter: the length of a perturbation; pattern: the first radius")
    q: Directions | None = Field(
        None,
        description="rge, fzoo (two at least): directions per step; None: the number of active coordinates; fg-w, lg-fg-a: "
        "passes per step; None: 1; pattern: moves per step, an even number; None: all",
    )
    difference: Literal["forward", "central"] = Field("forward", description="central costs two queries a coordinate")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="delta: the dtype in which changes travel; statistics and losses stay fp32"
    )
    emulate_bf16: bool = Field(
        False, description="take bf16 where the hardware has no bfloat16 products, which is slow, and else an error"
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="delta: whether a C++ compiler (on a GPU Triton) is used; auto: where the queries of stop.epochs pay for it",
    )
    memory_mb: Annotated[Positive, Field(le=1e9)] | None = Field(
        None, description="reuse: refuse a batch whose features need more MiB; delta: for a chunk's changes"
    )

    @model_validator(mode="before")
    @classmethod
    def _engine(cls, keys: Any) -> Any:
        """The float64 base pass of engine delta and the values that it keeps cost more than the gradient itself."""
        return {"engine": "full", **keys} if isinstance(keys, dict) and keys.get("estimator") in rivals.FIRST_ORDER else keys

    def conflicts(self, config) -> Iterator[str]:
        """See :class:`Section`."""
        has_none = config.task.kind == "objective" or (self.engine != "delta" and self.estimator not in rivals.FIRST_ORDER)
        if self.precision != "fp32" and has_none:
            yield f'zo.precision = "{self.precision}": only zo.engine = "delta" has it, which an objective has not'
        yield from rivals.conflicts(config)


class Sparsity(Section):
    """Which coordinates are perturbed."""

    ratio: Ratio = Field(0.9, description="the fraction of prunable weights that is pruned")
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
    pattern: Literal["dynamic", "static", "regrasp", "adaptive"] = Field(
        "dynamic",
        description="redraw S by the ratios; keep the first (M2); score anew at every redraw (M1); adaptive: redraw at every "
        "step, a share of each layer by what its coordinates have given so far",
    )
    share: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="adaptive: that share; the rest is drawn at random")
    measure: Literal["gradient", "decrease"] = Field(
        "gradient", description="adaptive: running mean of |ghat|^2, or of ghat^2 / H_jj, the decrease that gauss-newton predicts"
    )
    prune: Literal["weights", "all"] = Field(
        "weights", description="conv and linear weights only (others stay active), or every parameter"
    )
    redraw_epochs: Count = Field(5, description="K_sparse: draw a new S every so many epochs (not adaptive)")
    redraw_steps: Count | None = Field(None, description="draw a new S every so many steps instead")
    q: Directions = Field(192, description="zo-grasp: directions per RGE")
    temperature: Moderate = Field(
        1.0, description="fo-grasp: logits are divided by it before weights are scored (the authors' code: 200)"
    )
    lpr: str | None = Field(None, description="read the ratios from this file (python -m dzhpc.prune) instead of scoring")

    def conflicts(self, config) -> Iterator[str]:
        """See :class:`Section`."""
        if self.target == "weights" and self.pattern != "static":
            yield f'sparsity.pattern = "{self.pattern}": sparsity.target = "weights" needs "static"'
        if self.temperature != 1 and config.task.kind != "classification":
            yield f'sparsity.temperature = {self.temperature:g}: divides logits, which task.kind = "{config.task.kind}" has not'
        if self.pattern == "adaptive" and self.measure == "decrease" and config.optim.name != "gauss-newton":
            yield 'sparsity.measure = "decrease": only optim.name = "gauss-newton" knows the curvature; use "gradient"'
        if self.pattern == "regrasp" and self.lpr:
            yield 'sparsity.lpr: a fixed file contradicts pattern = "regrasp", which scores anew; remove one of them'


class Optim(Section):
    """The optimiser (torch.optim, or damped Gauss-Newton) and its learning-rate schedule, evaluated at every step."""

    name: Literal["sgd", "adam", "muon", "gauss-newton"] = Field(
        "sgd",
        description="torch.optim's (muon: SGD for vectors); gauss-newton: outputs of CGE's queries as columns of the Jacobian",
    )
    lr: Moderate = Field(0.1, description="the peak learning rate; muon: of matrices and kernels, try 0.03")
    lr_vectors: Moderate = Field(0.1, description="muon: the peak learning rate of all others, which SGD moves")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="sgd, muon; gauss-newton: of the step")
    weight_decay: Decay = Field(
        5e-4, description="L2, added to the gradient; gauss-newton, muon (only matrices; try 0.05): decoupled"
    )
    nesterov: bool = Field(False, description="sgd, muon, gauss-newton")
    schedule: Literal["cosine", "step", "constant"] = Field("cosine", description="cosine ends at 0 after stop.epochs")
    warmup_epochs: Epochs = Field(3.0, description="linear from 0 to lr")
    milestones: list[Epochs] = Field([], description="step: the epochs at which lr is multiplied by gamma")
    gamma: Moderate = Field(0.1, description="step: see milestones")
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.03, description="gauss-newton: lambda in delta = -(H + lambda D)^-1 g"
    )
    damping_kind: Literal["absolute", "relative", "marquardt"] = Field(
        "absolute", description="gauss-newton: D is 1, the mean of diag H, or diag H itself"
    )
    adapt: bool = Field(
        False,
        description="gauss-newton: ask for the loss of the new theta on the batch; not lower: lambda * 4, and again; else lambda "
        "follows from how right the prediction was",
    )
    average_curvature: Kept = Field(0.0, description="gauss-newton: H is this much of its average over the steps of one S")
    average_gradient: Kept = Field(0.0, description="gauss-newton: the same of the gradient")
    trust: Positive | None = Field(
        None, description="gauss-newton: bound on sqrt(delta^T H delta), the change of the outputs that a step predicts"
    )
    sketch: Count | None = Field(
        None,
        description="gauss-newton: compress outputs by random signs to so many numbers a coordinate; None: for memory alone",
    )
    memory_mb: Annotated[Positive, Field(le=1e9)] = Field(
        4096.0, description="gauss-newton: MiB for Jacobian and H; the Jacobian is compressed to 4 numbers a coordinate beyond"
    )

    @property
    def tries(self) -> bool:
        """Whether steps are accepted or rejected."""
        return self.name == "gauss-newton" and self.adapt

    def conflicts(self, config) -> Iterator[str]:
        """See :class:`Section`."""
        if self.nesterov and (self.name == "adam" or self.momentum == 0):
            yield 'optim.nesterov = true: needs name = "sgd" and a momentum above 0'
        if self.name == "muon" and config.sparsity.target == "weights":
            yield 'optim.name = "muon": moves all of a matrix, and sparsity.target = "weights" keeps zeros; use "sgd"'
        if self.name == "gauss-newton" and config.data.shards > 1:
            yield f'data.shards = {config.data.shards}: optim.name = "gauss-newton" takes the batch whole; leave the key out'
        if self.name == "gauss-newton" and config.zo.estimator != "cge":
            yield (
                f'optim.name = "gauss-newton": zo.estimator = "{config.zo.estimator}" gives no columns of the Jacobian; '
                'use "cge", or another optimiser'
            )
        if self.schedule == "step" and not self.milestones:
            yield 'optim.schedule = "step": needs optim.milestones, the epochs at which lr drops'


class Stop(Section):
    """When the run ends."""

    epochs: Annotated[Epochs, Field(gt=0)] = Field(
        50.0, description="the length of the run and of its schedule (an objective's epoch is one step)"
    )
    steps: Total | None = Field(None, description="end early at this step; the schedule is unaltered")
    queries: Total | None = Field(None, description="end after the step that reaches this many queries")
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="end when an evaluation reaches it")
    walltime: Seconds | None = Field(None, description="stop (exit 75) this long after training began, in seconds or H:MM:SS")


class Checkpoint(Section):
    """When the state is written; a final checkpoint always is."""

    every_steps: Count | None = Field(None, description="write every so many steps")
    every_minutes: Positive = Field(10.0, description="write when the last one is this old")
    keep: Annotated[int, Field(ge=2, le=LARGEST)] = Field(3, description="how many of the newest files stay")
    on_full: Literal["stop", "continue"] = Field(
        "stop", description="a checkpoint that cannot be written (disk full) ends the run (exit 3), or is left out with a warning"
    )


class Eval(Section):
    """Evaluation on the test set; a final one is always made."""

    every_epochs: Count = Field(1, description="evaluate every so many epochs")
    batch_size: Count = Field(1000, description="test images in one forward pass; ranks share the passes")
