"""A rule: how a change travels through one kind of operation, and what the mechanism may do with it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dzhpc.engines.batch import changed
from dzhpc.engines.delta.change import Change, Operation, flattened, shifted

Statistics = Callable[[Operation], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Rule:
    """``function(operation)`` -> the change of the operation's output; the traits say what else is known of it.

    fusable: elementwise or nearly so: a compiler merges neighbours into few passes over memory. Made of torch operations that
        need no values to be known, and of none that change a tensor.
    native: computed in the type that changes travel in; all others compute in the parameters' type.
    sharp: compares base values with each other or needs their sum, so that rounding them would change the answer.
    kinked: which side of a kink a base value lies on decides what becomes of a change, however small.
    several: more than the first input may change.
    lists: the output is a list of values, and the function gives a list of changes.
    one_by_one: coordinates are evaluated one after another, which is slow, and is said.
    statistics: what a normalisation needs to know of its base input: (x less its mean, scale s). While neighbours are merged, the
        function finds it as ``operation.cache["statistics"]``.
    normalises: of a layer, whether it takes these statistics now (a BatchNorm in eval mode does not).
    tables: functions of the base input alone, shaped like it, computed once a batch, if there are any. The function finds them
        as ``operation.cache["tables"]`` while neighbours are merged.
    sums: what sums over the change make of it, as tensors of which the rest is made: a pass of its own, so that the operation
        begins a run. The function finds them as ``operation.cache["sums"]``, if they were made. Of use to them are
        :attr:`Change.means`, which the operation before is asked for.
    gives_means: the function takes a second argument: None, or how to get what an operation behind it calls x less its mean;
        then it may give :attr:`Change.means`.
    """

    function: Callable[..., Change | list[Change]]
    fusable: bool = False
    native: bool = False
    sharp: bool = False
    kinked: bool = False
    several: bool = False
    lists: bool = False
    one_by_one: bool = False
    statistics: Statistics | None = None
    normalises: Callable[[nn.Module | None], bool] = lambda module: True
    tables: Statistics | None = None
    sums: Statistics | None = None
    gives_means: bool = False


def one_by_one(op: Operation) -> Change:
    """f(x + D) - f(x) coordinate by coordinate: an operation may couple the samples of a batch."""
    count = next(len(c.data) for c in flattened(op.changes) if c is not None)
    base, rows = op.run(op.args, op.kwargs), []  # not op.value, which may stem from a float64 pass
    for k in range(count):
        args = [shifted(a, c, k) for a, c in zip(op.args, op.changes, strict=True)]
        rows.append(changed(op.run(tuple(args), op.kwargs), base))
    return Change(torch.stack(rows))


#: for operations that no other rule serves
FALLBACK = Rule(one_by_one, several=True, one_by_one=True)
