"""What the methods that DeepZero is compared with can be combined with."""

from collections.abc import Iterator

SEE_THE_NETWORK = ("fg-w", "lg-fg-a", "fa", "dfa", "align-ada", "align-zero")
FIRST_ORDER = ("autograd", *SEE_THE_NETWORK)  # no coordinate is asked for
IDLE = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "warmup_epochs": 0.0}  # no optimiser


def conflicts(config) -> Iterator[str]:
    """Keys of a Config that contradict its estimator: a line each."""
    zo, says = config.zo, f'zo.estimator = "{config.zo.estimator}"'
    if zo.estimator in (*SEE_THE_NETWORK, "pattern") and zo.difference == "central":
        yield f'zo.difference = "central": {says} takes none; leave it out'
    if zo.estimator in SEE_THE_NETWORK and config.task.kind == "sol":
        yield f"{says}: cannot see through a solver; use cge, rge or autograd"
    if zo.estimator == "lg-fg-a" and config.data.shards > 1:
        yield f"data.shards = {config.data.shards}: {says} has parts of its own"
    if zo.estimator == "fzoo" and zo.q == 1:
        yield f"zo.q = 1: {says} divides by a standard deviation; expected two directions at least"
    if zo.estimator == "pattern":
        yield from _of_a_search(config, says)


def _of_a_search(config, says: str) -> Iterator[str]:
    """It moves theta itself, a coordinate at a time."""
    if config.sparsity.ratio > 0:
        yield f"sparsity.ratio = {config.sparsity.ratio:g}: {says} polls every coordinate; set it to 0.0"
    if config.zo.q is not None and config.zo.q % 2:
        yield f"zo.q = {config.zo.q}: {says} takes moves in pairs; expected an even number"
    for key, value in IDLE.items():
        if getattr(config.optim, key) != value:
            yield f"optim.{key} = {getattr(config.optim, key)}: {says} has no optimiser; set it to {value}"
