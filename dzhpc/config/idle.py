"""Keys that have no effect beside others, or one that is seldom meant: they are named, since a wrong guess costs a run."""

from collections.abc import Iterator

from dzhpc.config.names import is_function
from dzhpc.config.rivals import FIRST_ORDER

NEWTON = ("damping", "damping_kind", "adapt", "average_curvature", "average_gradient", "trust", "sketch", "memory_mb")
SCORED = (
    "target",
    "scores",
    "rule",
    "pattern",
    "share",
    "measure",
    "prune",
    "redraw_epochs",
    "redraw_steps",
    "q",
    "lpr",
    "temperature",
)
OF_BATCHES = ("name", "path", "image_size", "batch_size", "train_limit", "test_limit", "augment", "mean", "std")


def idle(config) -> dict[str, str]:
    """Idle keys of a Config -> what makes them so, such as ``optim.name = "sgd"``; of those that are not their defaults."""
    zo, sparsity, optim, kind = config.zo, config.sparsity, config.optim, config.task.kind
    estimator, own = f'zo.estimator = "{zo.estimator}"', is_function(zo.estimator)
    singly = own or zo.estimator in ("cge", "pattern")  # asks for single coordinates
    objective = f'task.kind = "{kind}"' if kind == "objective" else ""
    fresh = sparsity.ratio > 0 and sparsity.redraw_steps in (None, 1) and sparsity.pattern == "adaptive" and sparsity.share < 1
    rows = (
        ("optim", NEWTON, f'optim.name = "{optim.name}"', optim.name != "gauss-newton"),
        ("optim", ("average_curvature", "average_gradient"), "another S at each step", fresh),
        ("optim", ("lr_vectors",), f'optim.name = "{optim.name}"', optim.name != "muon"),
        ("optim", ("momentum",), f'optim.name = "{optim.name}"', optim.name == "adam"),
        ("optim", ("milestones", "gamma"), f'optim.schedule = "{optim.schedule}"', optim.schedule != "step"),
        ("zo", ("q",), estimator, not own and zo.estimator not in ("rge", "fzoo", "pattern", "fg-w", "lg-fg-a")),
        ("zo", ("difference",), estimator, zo.estimator in FIRST_ORDER),
        ("zo", ("engine", "compile", "memory_mb"), objective, bool(objective)),
        ("zo", ("precision", "emulate_bf16", "compile"), estimator, not singly and not objective),
        ("zo", ("compile", "emulate_bf16"), f'zo.engine = "{zo.engine}"', singly and not objective and zo.engine != "delta"),
        ("zo", ("memory_mb",), f'zo.engine = "{zo.engine}"', not objective and zo.engine == "full"),
        ("data", OF_BATCHES, objective, bool(objective)),
        ("eval", ("batch_size",), objective, bool(objective)),
        ("stop", ("target_accuracy",), f'task.kind = "{kind}"', kind in ("objective", "sol")),
        ("stop", ("target_accuracy",), 'task.loss = "mse"', kind == "defense" and config.task.loss == "mse"),
        ("sparsity", SCORED, "sparsity.ratio = 0", sparsity.ratio == 0),
        ("sparsity", ("share", "measure"), f'sparsity.pattern = "{sparsity.pattern}"', sparsity.pattern != "adaptive"),
        ("sparsity", ("redraw_steps",), f'sparsity.pattern = "{sparsity.pattern}"', sparsity.pattern == "static"),
        ("sparsity", ("redraw_epochs",), f'sparsity.pattern = "{sparsity.pattern}"', sparsity.pattern in ("static", "adaptive")),
        ("sparsity", ("scores", "q", "temperature"), "sparsity.lpr", sparsity.lpr is not None),
        ("sparsity", ("q",), f'sparsity.scores = "{sparsity.scores}"', sparsity.scores != "zo-grasp"),
        ("sparsity", ("temperature",), f'sparsity.scores = "{sparsity.scores}"', sparsity.scores != "fo-grasp"),
    )  # fmt: skip
    why: dict[str, str] = {}
    for section, keys, reason, applies in rows:
        values = getattr(config, section)
        for key in keys if applies else ():
            if getattr(values, key) != type(values).model_fields[key].get_default():
                why.setdefault(f"{section}.{key}", reason)
    return why


def lines(why: dict[str, str]) -> list[str]:
    """What to say of them: a line for each reason."""
    return [
        f"{', '.join(k for k, r in why.items() if r == reason)}: no effect with {reason}"
        for reason in dict.fromkeys(why.values())
    ]


def unmeant(config) -> Iterator[str]:
    """What the optimiser of a Config does that is seldom meant, by its warm-up and its weight decay: a line each."""
    optim, sparsity, epochs = config.optim, config.sparsity, config.stop.epochs
    if optim.warmup_epochs >= epochs:
        yield f"optim.warmup_epochs = {optim.warmup_epochs:g}: the run ends at {epochs:g} epochs, before optim.lr is reached"
    key = f"optim.weight_decay = {optim.weight_decay:g}"
    if optim.weight_decay == 0:
        return
    if config.task.kind == "objective":
        yield f"{key}: pulls theta to 0, away from the minimum of the objective; is that meant? If not, set it to 0"
    if optim.name == "adam" and sparsity.ratio > 0 and sparsity.target == "gradients":
        yield f"{key}: Adam moves coordinates that were never in S by the whole of optim.lr at each step, towards 0; set it to 0"
