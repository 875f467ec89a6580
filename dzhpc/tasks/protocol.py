"""What a task is to the trainer: a loss to be minimised by queries, and all that the loop asks of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dzhpc.config import Config
from dzhpc.method import scores
from dzhpc.method.first_order import SharedGradient

if TYPE_CHECKING:
    from dzhpc.engines.protocol import Engine


@dataclass(frozen=True)
class Cost:
    """What is asked of the task's black box, in queries; without a black box an evaluation of the loss counts as one.

    bind: what one bind asks. query: what one evaluation of the loss at perturbed parameters asks. evaluation: what a whole
    evaluation asks, which is nothing where nobody but us answers it. box: names the black box where it is an error that no
    perturbation changes its answers (quantised ones, say); "" where that may happen to a healthy run.
    """

    bind: int = 1
    query: int = 1
    evaluation: int = 0
    box: str = ""


class Task(ABC):
    """A loss to be minimised by queries. All of it is replicated: every rank holds the same, with the same bits.

    A task is made by ``Class(config, device)``; keys of [task] that belong to a class of the user's own are further arguments.
    So is ``data_set``, where the constructor has such a one: what :meth:`read` gave on the root, its arrays once on each node.
    config: the input, with the fields filled in that the data decide; frozen keys of a restart are compared with it.
    model: holds the parameters; parameters that require no gradient have no coordinates.
    engine: over the same parameters, in the same order.
    steps_per_epoch: at least 1. evaluation_parts: pieces of an evaluation that ranks may share, at least 1.
    summed: whether the loss of a batch is a sum over its examples; else it is their mean.
    in_shards: whether ``bind`` and ``bind_for_scores`` take a shard, so that the input may say data.shards = n above 1.
    data_bytes: of the data set, which a node holds once; 0 where each rank has its own.
    shared: the step of a first-order estimator in parts that ranks share; None: each rank binds and differentiates the whole.

    Methods may raise InputError for what cannot work, NumericalError for what has stopped working, BlackBoxError where the black
    box fails for good; any of them on some ranks only.
    """

    config: Config
    model: torch.nn.Module
    engine: "Engine"
    steps_per_epoch: int
    evaluation_parts: int = 1
    cost: Cost = Cost()
    summed: bool = False
    in_shards: bool = False
    data_bytes: int = 0
    shared: SharedGradient | None = None

    @classmethod
    def read(cls, config: Config) -> object:
        """What the constructor takes as ``data_set``: read from files on the root alone, and pickled for other ranks."""
        raise NotImplementedError(f"{cls.__name__} takes a data_set, but does not say how it is read")

    @abstractmethod
    def bind(self, step: int, shard: int = 0) -> float:
        """Bind the batch of ``step`` (0, 1, ...), a function of (seed, step) alone, to the engine: the loss at theta.

        shard: which of the n = ``data.shards`` parts: every n-th example, from this one on; a task that is not
        ``in_shards`` need not take the argument, and is never given it. The model is left in the mode in which it is trained;
        this is the only call that moves BatchNorm's running statistics.
        """

    @abstractmethod
    def bind_for_scores(self, number: int, shard: int | None = None) -> float:
        """Bind the ``number``-th batch for pruning scores, a function of (seed, number) alone: the loss at theta.

        shard: which part of it, None: the whole; as in ``bind``.
        """

    @abstractmethod
    def evaluate(self, parts: Sequence[int], step: int) -> np.ndarray:
        """[len(parts), 3] float64: summed loss, correct answers (NaN where that has no meaning), and count of each part.

        parts: numbers below ``evaluation_parts``, a part's row being the same whoever computes it. step: those done so far.
        Parameters and buffers are left as they were.
        """

    @property
    def lost(self) -> int:
        """Perturbed queries of this rank since the last bind whose difference counts as 0, the loss being lost there."""
        return 0

    def made(self) -> dict[str, Mapping[str, Tensor]]:
        """What has to be the same on all ranks, but comes from a file or from user code that each rank runs by itself.

        The name that errors call it -> tensors by name; what others depend on comes first. Ranks compare it before they begin.
        """
        keys = {"task.kind": self.config.task.kind, "model.name": self.config.model.name}
        own = [f"{key} = {value}" for key, value in keys.items() if ":" in value]
        return {own[0]: {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}} if own else {}

    def examples(self) -> Mapping[str, Tensor]:
        """All data by name, examples along the first axis: a restart warns where they are others. {} where there are none."""
        return {}

    def try_box(self) -> None:
        """Raise InputError where a black box of the user's answers otherwise than it must; asked once a launch, not counted."""
        return

    def prunable(self) -> Sequence[str]:
        """Names of the parameters that pruning chooses among, in the engine's order; the others stay active.

        Convolutional and linear weights, or all parameters (``sparsity.prune``).
        """
        return scores.prunable_layers(self.model, self.engine.index, self.config.sparsity.prune)
