"""The inputs that several test modules train, small variations of one another: ``text(DIGITS, model={"width": 6})``."""

import json
from collections.abc import Mapping

Sections = Mapping[str, Mapping[str, object]]
DIGITS = {  # 7 steps an epoch; engine "reuse" starts fastest: nothing is compiled
    "model": {"name": "cnn", "depth": 2, "width": 4},
    "data": {"name": "digits", "batch_size": 48, "train_limit": 336},
    "zo": {"engine": "reuse", "mu": 1e-3},
    "sparsity": {"ratio": 0.5, "redraw_steps": 3, "q": 6},
    "optim": {"lr": 0.05, "warmup_epochs": 0.5},
    "eval": {"batch_size": 100},
    "stop": {"epochs": 4, "steps": 8},
}
OBJECTIVE = {
    "task": {"kind": "objective", "function": "userland:Bowl"},
    "zo": {"mu": 1e-6},
    "sparsity": {"ratio": 0.0},
    "optim": {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.0, "warmup_epochs": 0, "schedule": "constant"},
    "stop": {"epochs": 60},
}
DEFENSE = {
    "task": {"kind": "defense"},
    "model": {"name": "dncnn", "depth": 3, "width": 4},
    "data": {"batch_size": 13},
    "zo": {"mu": 1e-4},
    "sparsity": {"ratio": 0.5, "scores": "random", "redraw_steps": 2},
    "optim": {"name": "adam", "lr": 1e-3, "warmup_epochs": 0},
    "eval": {"batch_size": 5},
    "stop": {"epochs": 2},
}
CERTIFY = {
    "task": {"kind": "defense", "retries": 0},
    "model": {"name": "dncnn", "depth": 2, "width": 4, "channels": 1},
    "data": {"name": "digits", "batch_size": 50},
    "sparsity": {"ratio": 0.0},
}
SOL = {  # a wake of 8 x 16 cells, too coarse to be physics
    "task": {"kind": "sol", "resolution": 8, "factor": 2, "unroll": 3},
    "model": {"name": "corrector", "widths": [3]},
    "data": {"name": "wake", "root": ".", "batch_size": 3, "train_limit": 9},
    "zo": {"mu": 1e-3},
    "sparsity": {"ratio": 0.5, "scores": "random", "redraw_steps": 2},
    "optim": {"name": "adam", "lr": 1e-3, "warmup_epochs": 0},
    "stop": {"epochs": 2},
}


def text(sections: Sections, **changes: Mapping[str, object]) -> str:
    """An input file; ``changes``: further keys of its sections, and others instead of those that it has."""
    both = {name: {**sections.get(name, {}), **changes.get(name, {})} for name in {**sections, **changes}}
    return "\n".join(f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in keys.items()) for name, keys in both.items())
