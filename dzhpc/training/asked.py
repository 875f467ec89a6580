"""The objective of a :class:`dzhpc.Loop`: somebody else is asked for its losses; and its input."""

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import nn

from dzhpc import config as configuration
from dzhpc.errors import InputError
from dzhpc.tasks.objective import Blocks, ObjectiveEngine
from dzhpc.tasks.protocol import Cost, Task

log = logging.getLogger("dzhpc")
ASKED = "dzhpc:Loop"  # what a checkpoint calls the loss


class Asked(Task):
    """An objective whose losses somebody else is asked for."""

    steps_per_epoch = 1
    cost = Cost()

    def __init__(self, config: configuration.Config, theta0: object, answer: Callable):
        self.config = config
        try:
            self.model = theta0 if isinstance(theta0, nn.Module) else Blocks(theta0)
        except ValueError as error:
            raise InputError(f"theta0 is none ({error})") from None
        self.engine = ObjectiveEngine(answer, self.model, False, 2**31, 0, "the loss")

    @property
    def lost(self) -> int:
        return self.engine.lost

    def bind(self, step: int) -> float:
        return self.engine.bind(step)

    def bind_for_scores(self, number: int) -> float:
        return self.engine.bind(number)

    def evaluate(self, parts: Sequence[int], step: int) -> np.ndarray:
        return np.array([[self.engine.bind(step), np.nan, 1.0] for _ in parts]).reshape(len(parts), 3)


def config_of(
    estimator: str, mu: float, optimizer: str, lr: float, seed: int, keys: Mapping[str, object]
) -> configuration.Config:
    """The arguments of a loop as an input. Raises InputError."""
    seed = int(seed) if isinstance(seed, np.integer) else seed
    table: dict[str, dict[str, object]] = {
        "run": {"name": "loop", "seed": seed}, "task": {"kind": "objective", "function": ASKED},
        "zo": {"estimator": estimator, "mu": mu}, "sparsity": {"ratio": 0.0},
        "optim": {"name": optimizer, "lr": lr, "momentum": 0.0, "weight_decay": 0.0, "warmup_epochs": 0.0,
                  "schedule": "constant"},
    }  # fmt: skip
    for key, value in keys.items():
        section, dot, name = str(key).partition(".")
        if not dot or section in ("task", "sparsity"):
            raise InputError(
                f'keys: {key!r}: expected SECTION.KEY of a section but [task] and [sparsity], such as "optim.momentum"'
            )
        table.setdefault(section, {})[name] = value
    config = configuration.parse(table, "dzhpc.Loop")
    why = configuration.idle(config) | {key: "dzhpc.Loop" for key in keys if key.partition(".")[0] not in ("zo", "optim")}
    why.pop("stop.epochs", None)  # the schedule's length
    for line in configuration.lines({key: reason for key, reason in why.items() if key in keys}):
        log.warning(line)
    return config
