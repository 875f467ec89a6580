"""Carries the changes of a chunk through the operations of a traced network, run by run.

A run is one operation, or neighbours that the compiler merges into few passes over memory. Changes of whole values travel in the
engine's precision, changes of single channels (which are small) in the parameters' type; statistics are always of that type.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx

from dzhpc.engines.delta import origins
from dzhpc.engines.delta.blocks import Blocks
from dzhpc.engines.delta.change import Change, Origin
from dzhpc.engines.delta.fused import Fused, Run
from dzhpc.engines.delta.layout import Layout
from dzhpc.engines.delta.operations import Changes, Operations
from dzhpc.engines.delta.passes import Passes
from dzhpc.engines.kernels.find import Kernels
from dzhpc.engines.traced import Traced, name_of


class Propagation:
    """The rules of a network's operations, applied to the base values of the batch that it ran last.

    dtype: of the parameters. travel: the type that changes of whole values travel in. say: gets a line for an operation without a
        rule.
    """

    def __init__(self, network: Traced, dtype: torch.dtype, travel: torch.dtype, kernels: Kernels, say: Callable[[str], None]):
        self.network, self.operations = network, Operations(network, dtype, travel, kernels)
        self._kernels, self._say = kernels, say
        self._fused, self.blocks, self._passes = Fused(self.operations), Blocks(self.operations), Passes(self.operations)
        self._runs: dict[tuple[fx.Node, ...], Run] = {}
        self._names: dict[tuple[fx.Node, int], str] = {}  # of parameters, by id, in their layers

    def new_batch(self) -> None:
        """Forget what was derived from the last batch's base values."""
        self.operations.new_batch()

    @property
    def storages(self) -> dict[int, int]:
        """Address -> bytes of what was derived from the batch's base values."""
        return self.operations.storages

    def seed(self, node: fx.Node, parameter: Tensor, local: np.ndarray, mu: float) -> Origin | None:
        """Where the chunk of a parameter's coordinates ``local`` [P] begins: ``node`` reads it; None where no rule is known."""
        if node.op == "get_attr":
            return origins.of_parameter(parameter, local, mu)
        if (node, id(parameter)) not in self._names:
            self._names[node, id(parameter)] = next(
                name for name, p in self.operations.module(node).named_parameters() if p is parameter
            )
        return origins.of_module(self.operations.at_hand(node), self._names[node, id(parameter)], parameter, local, mu)

    def is_taken_away(self, node: fx.Node, seed: Origin) -> bool:
        """Whether all that read ``node`` subtract the mean of each channel over the batch, and its change is nothing else."""
        readers = node.users if seed.constant and seed.axis == 1 else ()
        return bool(readers) and all(map(self.operations.centres, readers))

    def has_kink(self, nodes: list[fx.Node]) -> bool:
        """Whether some of the operations have a kink."""
        return any(self.operations.rule(node).kinked for node in nodes if node.op != "output")

    def waits(self, node: fx.Node, runs: list[Run]) -> bool:
        """Whether an origin may be left to the first run, which makes it in its registers."""
        return bool(runs) and runs[0].fused and self._kernels.compiling and all(u in runs[0].nodes for u in node.users)

    def try_out(self, nodes: list[fx.Node], changes: Changes) -> None:
        """Add to ``changes`` those of all nodes, one by one and without a compiler."""
        for node in nodes:
            changes[node] = self._step(node, changes, kernels=False)

    def runs(self, nodes: list[fx.Node], changes: Changes) -> list[Run]:
        """The nodes in order, grouped; one whose rule begins with sums begins a run.

        ``changes`` says what kind of change each one gets.
        """
        fusable = {node for node in nodes if self._is_fusable(node, changes)}
        groups: list[list[fx.Node]] = []
        for node in _scheduled(nodes, fusable):
            if node not in fusable or not groups or groups[-1][-1] not in fusable or self.operations.rule(node).sums:
                groups.append([])
            groups[-1].append(node)
        for group in groups:
            if group[0] in fusable:
                self.blocks.block(tuple(group))
        return [self._runs.setdefault(tuple(g), Run(tuple(g), g[0] in fusable)) for g in groups]

    def advance(self, run: Run, changes: dict[fx.Node, Change | Origin | list[Change]]) -> None:
        """Add to ``changes`` those that leave the run."""
        node = run.nodes[0]
        if not run.fused:
            changes[node] = self.later(node, changes) or self._step(node, changes, kernels=True)
        elif not (self.blocks.advance(run.nodes, changes) or self._passes.advance(run.nodes, changes)):
            self._fused.advance(run, changes)

    def later(self, node: fx.Node, changes: Changes) -> Origin | None:
        """What an operation makes, where that may be left to the block behind it."""
        return self.blocks.convolved(node, changes.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None)

    def _step(self, node: fx.Node, changes: Changes, kernels: bool) -> Change | list[Change]:
        """The change of one operation's output, given those of its inputs. kernels: whether compiled ones may serve."""
        operations = self.operations
        incoming = operations.incoming(node, changes)
        rule = operations.rule(node, incoming)
        if rule.one_by_one:
            self._say(f"{name_of(node)} has no rule: evaluated one coordinate at a time")
        if not rule.native:
            incoming = _each(incoming, lambda c: c.to(operations.dtype, operations.dtype))
        operation = operations.at_hand(node, incoming, kernels)
        if not rule.gives_means:
            return _each(rule.function(operation), operations.travelling)
        change = rule.function(operation, self._centred_behind(node) if operation.kernels else None)
        return replace(operations.travelling(change), means=change.means)

    def _centred_behind(self, node: fx.Node) -> Callable[[], Tensor] | None:
        """What an operation that takes means of the node's change calls x less its mean, as it lies beside that change."""
        operations = self.operations
        norm = next(filter(operations.centres, node.users), None)
        layout = Layout(
            apart=operations.has_library(operations.network.value(node)), rounded=operations.travel != operations.dtype
        )
        return None if norm is None else lambda: operations.centred(norm, layout)

    def _is_fusable(self, node: fx.Node, changes: Changes) -> bool:
        incoming = self.operations.incoming(node, changes)
        found = [c for c in incoming if c is not None]
        return self.operations.rule(node, found).fusable and all(isinstance(c, Change) for c in found)


def _scheduled(nodes: list[fx.Node], fusable: set[fx.Node]) -> list[fx.Node]:
    """The nodes in an order that keeps neighbours to be merged together: all others as early as they can be."""
    waiting, order = list(nodes), []
    while waiting:
        ready = [node for node in waiting if not any(a in waiting for a in node.all_input_nodes)]
        node = next((node for node in ready if node not in fusable), ready[0])
        waiting.remove(node)
        order.append(node)
    return order


def _each(changes, function: Callable[[Change], Change]):
    """A function of each change, in lists of them too."""
    if isinstance(changes, list):
        return [_each(c, function) for c in changes]
    return None if changes is None else function(changes)
