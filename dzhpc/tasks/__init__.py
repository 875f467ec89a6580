"""Tasks: what is trained. The trainer sees only this protocol."""

from typing import Protocol

import numpy as np
import torch

from dzhpc.config import Config
from dzhpc.method.first_order import Parts
from dzhpc.tasks.classification import Classification
from dzhpc.tasks.defense.task import DefenseTask
from dzhpc.tasks.objective import ObjectiveTask
from dzhpc.tasks.sol.task import SolTask


class Task(Protocol):
    """A loss to be minimised by queries. All of it is replicated: every rank holds the same."""

    config: Config  # with the fields filled in that the data decide
    model: torch.nn.Module
    engine: object  # bind, differences, directional, cut: see dzhpc.engines.full.Full
    steps_per_epoch: int
    evaluation_parts: int  # pieces of an evaluation that ranks may share
    evaluation_queries: int  # what an evaluation asks of the black box, whose questions are counted where there is one
    query_cost: int  # what one evaluation of the loss asks
    bind_cost: int  # what one bind asks
    box_key: str  # names the black box where it is an error that no perturbation changes its answers; "" elsewhere
    parts: Parts | None  # first-order steps in parts that ranks share, by ``gradient_rows(mine, step)``; None: each rank does all

    def bind(self, step: int) -> float:
        """Bind the step's batch to the engine: the base loss."""

    def bind_for_scores(self, number: int) -> float:
        """Bind the ``number``-th batch for pruning scores."""

    def evaluate(self, parts: range, step: int) -> np.ndarray:
        """[len(parts), 3] float64: summed loss, correct answers (NaN where that has no meaning), and count of each part."""


TASKS = {"classification": Classification, "objective": ObjectiveTask, "defense": DefenseTask, "sol": SolTask}


def make_task(config: Config, device: torch.device) -> Task:
    """The task of ``task.kind``. Raises InputError for data, models or functions that do not fit."""
    return TASKS[config.task.kind](config, device)
