"""How the changes of each parameter's coordinates reach the output: the route, once a trace; sizes and runs, once a shape."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from dzhpc.engines.delta.change import Change, flattened
from dzhpc.engines.delta.fused import Run
from dzhpc.engines.delta.propagation import Propagation
from dzhpc.engines.delta.rules import table
from dzhpc.engines.traced import Traced, name_of
from dzhpc.method.coordinates import ParameterIndex

SHAPE = {"size", "dim", "ndimension", "numel", "nelement", "shape", "ndim", "dtype", "device", "is_cuda"}
PROBE = 1e-3  # mu of the one coordinate that is tried; nothing depends on it


@dataclass(frozen=True)
class Route:
    """The graph's part of one parameter's plan."""

    nodes: list[fx.Node]  # from the parameter's operation to the output; empty where the output does not depend on it
    refusal: str  # why its coordinates must be evaluated one at a time; "" if they need not
    kind: tuple | None = None  # first operation, whether its change is dense, its channels' axis: all that the plan depends on
    taken_away: bool = False  # whether the next operations leave nothing of its changes

    @property
    def propagates(self) -> bool:
        """Whether changes travel here at all."""
        return bool(self.nodes) and not self.refusal


@dataclass(frozen=True)
class Sized:
    """A shape's part of the plan of a parameter whose changes propagate."""

    widest: int  # bytes of the largest change that one coordinate makes
    runs: list[Run]  # the operations between the first and the output
    last_read: list[list[fx.Node]]  # by each run: what no later one reads


class Plans:
    """Plans of all parameters. Made when the trace's values of some pass are at hand, which tell tensors from numbers.

    compiling: whether a compiler merges a run's operations, so that what stays inside it never reaches memory.
    """

    def __init__(self, traced: Traced, propagation: Propagation, index: ParameterIndex, compiling: Callable[[], bool]):
        self._traced, self._propagation, self._index, self._compiling = traced, propagation, index, compiling
        self.routes = [self._route(owner) for owner in range(len(index.names))]
        propagation.new_batch()  # seeds were tried on values that are not the batch's
        self.all_propagate = not any(route.refusal for route in self.routes)
        self.has_kinks = any(propagation.has_kink(route.nodes) for route in self.routes)
        self._sized: dict[torch.Size, dict[tuple, Sized]] = {}

    def knows(self, shape: torch.Size) -> bool:
        """Whether inputs of this shape have been measured."""
        return shape in self._sized

    def measure(self, shape: torch.Size) -> None:
        """Make the shape's part for all parameters, from the base values that the trace holds."""
        kinds = {route.kind: (owner, route) for owner, route in enumerate(self.routes) if route.propagates}
        self._sized[shape] = {kind: self._try_one(*first) for kind, first in kinds.items()}
        self._propagation.new_batch()  # what a trial derived is not what chunks will ask for

    def sized(self, owner: int, shape: torch.Size) -> Sized | None:
        """For inputs of a measured shape; None for a parameter whose changes do not propagate."""
        return self._sized[shape].get(self.routes[owner].kind)

    def _route(self, owner: int) -> Route:
        users = self._traced.users(owner) if self._index.parameters[owner].numel() else ()
        nodes: list[fx.Node] = []
        for node in self._traced.downstream(owner):
            if not self._is_constant(node) and (node in users or any(a in nodes for a in node.all_input_nodes)):
                nodes.append(node)
        refusal = self._refusal(owner, nodes)
        if refusal or not nodes:
            return Route(nodes, refusal)
        seed = self._propagation.seed(nodes[0], self._index.parameters[owner], np.zeros(1, np.int64), PROBE)
        if seed is None:
            return Route(nodes, f"{name_of(nodes[0])} has no rule for its {self._index.names[owner]}")
        kind = nodes[0], seed.channel is None, seed.axis
        return Route(nodes, "", kind, self._propagation.is_taken_away(nodes[0], seed))

    def _refusal(self, owner: int, nodes: list[fx.Node]) -> str:
        """Why no chunk can be propagated along these nodes, if none can; the last reason that is found."""
        users, refusal = self._traced.users(owner), ""
        if len(users) > 1:
            refusal = f"{self._index.names[owner]} is shared by {len(users)} operations"
        if nodes and not isinstance(nodes[-1].args[0], fx.Node):
            refusal = "the network gives several values"
        for node in nodes:
            keywords: list[fx.Node] = []
            fx.map_arg(node.kwargs, keywords.append)
            if any(a in nodes for a in keywords):
                refusal = f"{name_of(node)} takes a changing keyword argument"
            value = self._traced.value(node) if node.op != "output" else node
            if not isinstance(value, (Tensor, fx.Node)) and not table.find(node, None).lists:
                refusal = f"{name_of(node)} gives no tensor"
            if isinstance(value, Tensor) and not value.is_floating_point():
                refusal = f"{name_of(node)} gives integers or truth values"
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):  # changes would be lost in rounding
                refusal = f"{name_of(node)} gives numbers of 16 bits"
        return refusal

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether an operation gives sizes and types, or numbers made of them: no perturbation changes these."""
        if node.op not in ("call_function", "call_method") or isinstance(self._traced.value(node), Tensor):
            return False
        name = node.args[1] if node.target is getattr else node.target
        return name in SHAPE or (bool(node.all_input_nodes) and all(map(self._is_constant, node.all_input_nodes)))

    def _try_one(self, owner: int, route: Route) -> Sized:
        """Propagate one coordinate to learn how large its changes are."""
        first, *between, output = route.nodes
        seed = self._propagation.seed(first, self._index.parameters[owner], np.zeros(1, np.int64), PROBE)
        changes: dict[fx.Node, Change | list[Change]] = {first: seed.now()}
        self._propagation.try_out(between, changes)
        runs = self._propagation.runs(between, changes)
        if self._compiling():  # the others never reach memory
            made = (a for a in changes if a is first or any(a in run.leaving for run in runs))
            changes = {a: changes[a] for a in made if a is first or not self._propagation.later(a, changes)}
        if self._propagation.waits(first, runs):
            changes.pop(first)
        widest = max(c.data.numel() * c.data.element_size() for c in flattened(list(changes.values())))
        return Sized(widest, runs, _last_read(runs, output.args[0]))


def _last_read(runs: list[Run], output: fx.Node) -> list[list[fx.Node]]:
    """For each run the operations whose changes it is the last to read; a chunk's memory is bounded by letting go of them."""
    found: list[list[fx.Node]] = []
    later = {output}
    for run in reversed(runs):
        read = {a for node in run.nodes for a in node.all_input_nodes}
        found.append([a for a in read if a not in later])
        later |= read
    return found[::-1]
