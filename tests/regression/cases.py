"""The short runs whose bits are stored: every estimator, engine and task, and the verbs beside training."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from input_texts import CERTIFY, DEFENSE, DIGITS, OBJECTIVE, SOL, text

FLOW = {"warm_up": 4, "train_parameters": [2e5, 8e5], "valid_parameters": [4e5], "test_parameters": [6e5]}
RING = {"warm_up": 0, "train_parameters": [0.1, 0.2], "valid_parameters": [0.15], "test_parameters": [0.12]}
INPUTS = {
    "digits.toml": text(
        DIGITS, data={"batch_size": 16, "train_limit": 64}, sparsity={"redraw_steps": 2}, stop={"epochs": 4, "steps": 5}
    ),
    "objective.toml": text(OBJECTIVE, task={"function": "own:Bowl", "retries": 0}, stop={"steps": 10}),
    "defense.toml": text(DEFENSE, task={"classifier": "own:classify"}, data={"name": "own:images"}, stop={"epochs": 1}),
    "certify.toml": text(
        CERTIFY, task={"classifier": "own:nearest", "loss": "mse"}, zo={"estimator": "autograd"},
        optim={"lr": 0.01, "warmup_epochs": 0}, stop={"steps": 8},
    ),
    "sol.toml": text(SOL, task={"frames": 8, **FLOW}, stop={"steps": 3}),
    "ring.toml": text(
        {}, task={"kind": "sol", "simulator": "own:ring", "reference": "own:exact", "unroll": 3, "frames": 8, **RING}
    ),
}  # fmt: skip
INPUTS |= {
    f"{name.lower()}.toml": text(
        {name: keys for name, keys in DIGITS.items() if name != "model"}, model={"name": f"own:{name}"},
        data={"batch_size": 16, "train_limit": 64}, sparsity={"redraw_steps": 2}, stop={"steps": 5},
    )
    for name in ("Norms", "Dropout")
}  # fmt: skip


def sets(text: str) -> list[str]:
    """``--set`` arguments from "key=value key=value"."""
    return [part for word in text.split() for part in ("--set", word)]


@dataclass
class Case:
    """A command line; ``file`` is what it writes: a run folder for ``train``."""

    verb: str
    args: Sequence[str]
    file: str
    alone: bool = False  # in a process of its own: what is compiled might depend on what was compiled before
    bf16: bool = False  # needs a processor with bfloat16 products
    tolerance: float = 3e-3  # relative, of the numbers that hold on any processor
    rounding: float = 0.0  # of the gradient's norm, where the gradient is nothing else: 6e-8 of the loss / mu


def train(name: str, source: str, text: str = "", more: Sequence[str] = (), **traits) -> tuple[str, Case]:
    """A run in a folder with the case's name."""
    return name, Case("train", [f"{source}.toml", "--run-dir", name, *sets(text), *more], name, **traits)


# losses are subtracted in float32, or changes travel in bfloat16: few digits are left, and none where steps amplify what is lost;
# the first step of Adam is the sign of a gradient, be it ever so small
(FEW, HARDLY) = ({"tolerance": 0.05}, {"tolerance": 0.3})
SMALL = "zo.engine=delta data.batch_size=8 "  # nothing of it is compiled
VIT = "model.name=vit-tiny model.depth=1 model.width=6 model.heads=2 model.patch=4 model.image_size=8 "
FIRST_ORDER = "zo.estimator=autograd sparsity.ratio=0.0 "
WHITE = "task.classifier=judge.th task.classifier_model=own:Judge "
RINGS = "task.simulator=own:ring data.name=ring model.kernel=3 "
SCORED = "sparsity.scores=zo-grasp sparsity.q=3 zo.mu=1e-5 "  # theta + mu g must not diverge
LATENT = "model.name=ae-ds model.latent=4 model.hidden=3 model.image_size=8 zo.estimator=latent sparsity.ratio=0.0 "
COMPILED = "zo.engine=delta zo.compile=on data.train_limit=336 data.batch_size=112 sparsity.ratio=0.9 stop.steps=2 "
PLAN = ["--images", "6", "--n0", "20", "--n", "200", "--batch", "40", "--sigma", "0.4"]

CASES = dict([
    train("reuse", "digits", **FEW),
    train("reuse-central-adam", "digits", "zo.difference=central optim.name=adam optim.lr=0.01 sparsity.ratio=0.8", **FEW),
    train("reuse-regrasp", "digits", "sparsity.pattern=regrasp sparsity.ratio=0.8", **FEW),
    train("reuse-rge", "digits", "zo.estimator=rge zo.q=5 sparsity.scores=random", **FEW),
    train("reuse-static-weights", "digits", "sparsity.pattern=static sparsity.target=weights", **HARDLY),
    train("reuse-magnitude-all", "digits", "sparsity.rule=magnitude sparsity.prune=all optim.schedule=step",
          ["--set", "optim.milestones=[0.5,1.0]"], **FEW),
    train("reuse-autograd", "digits", FIRST_ORDER + "optim.nesterov=true"),
    train("reuse-norms", "norms", "optim.schedule=constant", **FEW),
    train("reuse-vit", "digits", VIT + "sparsity.ratio=0.9", **FEW),
    train("full", "digits", "zo.engine=full stop.steps=3", **FEW),
    train("full-rge-central", "digits", "zo.engine=full zo.estimator=rge zo.q=4 zo.difference=central", **HARDLY),
    train("full-fo-grasp", "digits", "zo.engine=full sparsity.pattern=static sparsity.scores=fo-grasp stop.steps=3", **FEW),
    train("full-autograd", "digits", FIRST_ORDER + "zo.engine=full data.augment=false"),
    train("full-dropout", "dropout", "zo.engine=full", **FEW),
    *(train(f"full-{name}", "digits", f"zo.engine=full task.loss=mse zo.estimator={name}")
      for name in ("fa", "dfa", "align-ada", "align-zero")),
    train("full-fg-w", "digits", "zo.engine=full zo.estimator=fg-w zo.q=3 sparsity.scores=random stop.steps=3"),
    train("lg-fg-a", "digits", "zo.estimator=lg-fg-a zo.q=2 model.name=local-mixer model.groups=2 model.grid=2 "
          "model.image_size=8 sparsity.scores=random"),
    train("delta-pattern", "digits", SMALL + "zo.estimator=pattern zo.mu=0.25 zo.q=60 sparsity.ratio=0.0 optim.momentum=0.0 "
          "optim.weight_decay=0.0 optim.schedule=constant optim.warmup_epochs=0.0"),
    train("delta", "digits", SMALL),
    train("delta-central-adam", "digits", SMALL + "zo.difference=central optim.name=adam optim.lr=0.01"),
    train("delta-rge", "digits", SMALL + "zo.estimator=rge zo.q=5"),
    train("delta-regrasp", "digits", SMALL + "sparsity.pattern=regrasp sparsity.scores=fo-grasp sparsity.ratio=0.8"),
    train("delta-static-weights", "digits", SMALL + "sparsity.pattern=static sparsity.target=weights"),
    train("delta-autograd", "digits", SMALL + FIRST_ORDER),
    train("delta-norms", "norms", SMALL),
    train("delta-vit", "digits", SMALL + VIT),
    train("delta-memory", "digits", SMALL + "zo.memory_mb=0.35 stop.steps=2"),
    train("delta-weights", "digits", SMALL + "model.weights=written/digits",
          ["--set", 'model.trainable=["fc.*","features.4.*"]']),
    train("delta-bf16", "digits", SMALL + "zo.precision=bf16", bf16=True, **FEW),
    train("delta-compiled", "digits", COMPILED + "model.width=16", alone=True),
    train("delta-compiled-bf16", "digits", COMPILED + "model.width=18 zo.precision=bf16", alone=True, bf16=True, **FEW),
    train("objective", "objective"),
    train("objective-central-adam", "objective", "zo.difference=central optim.name=adam"),
    train("objective-rge", "objective", "task.function=own:Rings zo.estimator=rge zo.q=3 zo.mu=1e-3 sparsity.ratio=0.4 "
          "optim.lr=1e-3 sparsity.q=5 sparsity.redraw_steps=2"),
    train("objective-static", "objective", "task.function=own:Rings zo.mu=1e-3 sparsity.ratio=0.4 sparsity.scores=random "
          "sparsity.pattern=static optim.lr=1e-3"),
    train("defense", "defense", "", ["--set", 'model.trainable=["model.4.weight"]']),
    train("defense-full-rge", "defense", "zo.engine=full zo.estimator=rge zo.q=5 zo.difference=central"),
    train("defense-zo-grasp", "defense", "zo.engine=reuse sparsity.scores=zo-grasp sparsity.q=3 optim.name=sgd", **HARDLY),
    train("defense-white", "defense", WHITE + "data.batch_size=6 stop.steps=2", **FEW),
    train("defense-first-order", "defense", WHITE + FIRST_ORDER),
    train("defense-mse", "defense", "task.loss=mse data.batch_size=6 stop.steps=3"),
    train("defense-mse-autograd", "defense", "task.loss=mse model.batch_norm=true " + FIRST_ORDER),
    train("defense-latent", "defense", LATENT, ["--set", 'model.trainable=["denoiser.*","encoder.*"]'], rounding=1e-3,
          **HARDLY),
    train("sol", "sol"),
    train("sol-zo-grasp", "sol", SCORED, **FEW),
    train("sol-full-rge", "sol", SCORED + "zo.engine=full zo.estimator=rge zo.q=5 zo.difference=central", **FEW),
    train("sol-full", "sol", "zo.engine=full sparsity.ratio=0.9 stop.steps=2", **FEW),
    train("sol-first-order", "sol", FIRST_ORDER),
    train("sol-phiflow", "sol", "task.simulator=phiflow zo.estimator=rge zo.q=2 stop.steps=1"),
    train("sol-ring", "sol", RINGS),
    train("sol-pairs", "sol", RINGS + "task.unroll=1"),
    train("sol-pairs-autograd", "sol", RINGS + FIRST_ORDER + "task.unroll=1"),
    ("prune", Case("prune", ["digits.toml", "-o", "prune.h5"], "prune.h5", **FEW)),
    ("prune-regrasp-all", Case("prune", ["digits.toml", "-o", "all.h5", *sets(SMALL + "sparsity.prune=all")], "all.h5", **FEW)),
    ("certify", Case("certify", ["written/denoiser", *PLAN, "-o", "certify.h5"], "certify.h5")),
    ("certify-adaptive", Case("certify", ["written/denoiser", *PLAN, "--adaptive", "-o", "adaptive.h5"], "adaptive.h5")),
    ("certify-bare", Case("certify", ["written/denoiser", *PLAN, "--no-denoiser", "-o", "bare.h5"], "bare.h5")),
    ("simulate", Case("simulate", ["sol.toml", "-o", "made.h5"], "made.h5")),
    ("simulate-ring", Case("simulate", ["ring.toml", "-o", "made-ring.h5"], "made-ring.h5")),
    ("evaluate", Case("evaluate", ["written/sol", "--data-root", ".", "--steps", "3,7", "--no-gif", "-o", "evaluate"],
                      "evaluate/evaluation.tsv")),
    train("lpr", "digits", "sparsity.lpr=written/lpr.h5", **FEW),
    train("packed", "digits", SMALL, ["--set", 'data.name="packed"', *sets("data.root=written data.path=packed.h5")]),
    # runs that the first version began, two steps further
    *((f"restart-{name}", Case("train", [f"again/{name}/input.toml", "--run-dir", f"again/{name}", *sets(f"stop.steps={steps}")],
                               f"again/{name}"))
      for name, steps in (("digits", 6), ("adam", 8), ("partial", 5), ("sol", 4))),
    ("certify-on", Case("certify", ["written/denoiser", *PLAN, "-o", "again/certificates.h5"], "again/certificates.h5")),
])  # fmt: skip
RANKS = ("reuse", "objective-rge", "delta")  # also on two ranks
