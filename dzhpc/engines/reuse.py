"""Engine ``reuse``: the paper's feature reuse for any traceable network.

Base features are kept once per batch; a query re-runs only the operations downstream of the perturbed parameter, or,
for a direction over all parameters, of the first of them.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, fx, nn

from dzhpc.engines.batch import BatchEngine
from dzhpc.engines.full import CHUNK
from dzhpc.engines.losses import Loss, loss_of
from dzhpc.engines.moved import closure
from dzhpc.engines.network import untouched
from dzhpc.engines.protocol import AT_ONCE, PLAIN
from dzhpc.engines.traced import Traced, Traces, need_module
from dzhpc.errors import InputError
from dzhpc.method.coordinates import ParameterIndex, cut


class Reuse(BatchEngine):
    """As :class:`dzhpc.engines.full.Full`, to the same bits, at the cost of a partial forward pass per coordinate.

    memory_mb: a batch whose kept features need more MiB is refused (None: no limit). Raises InputError for what is no
    module, has no parameters, or names no loss; ``bind`` raises it for a model that :class:`dzhpc.engines.traced.Traces` refuses.
    """

    at_once, compile_s, environment = AT_ONCE, 0.0, PLAIN

    def __init__(self, model: nn.Module, loss: str | Loss, memory_mb: float | None = None):
        need_module(model, "reuse")
        super().__init__(ParameterIndex.of(model), model, loss_of(loss))
        self._memory_mb = memory_mb
        self._traces = Traces(model, self.index.parameters, self.loss, self._pinned, "reuse")
        self._tails: Tails | None = None
        self._outputs: Tensor | None = None  # at theta

    @property
    def base_bytes(self) -> int:
        """Memory of the kept features; 0 before the first ``bind``."""
        return self._tails.traced.kept_bytes if self._tails else 0

    @property
    def peak_bytes(self) -> int:
        """That of the kept features: nothing is derived from them."""
        return self.base_bytes

    @torch.no_grad()
    def bind(self, inputs: Tensor, targets: Tensor) -> float:
        """As :meth:`dzhpc.engines.full.Full.bind`. Raises InputError for features that need more than ``memory_mb``, too."""
        self._begin()
        self.batch = inputs, targets
        with untouched(inputs, self.model):
            traced = self._traces.current(inputs, targets, self._start, frozenset())
            if self._tails is None or self._tails.traced is not traced:
                self._tails = Tails(traced, len(self.index.names))
            self._outputs = traced.run(inputs, self._tails.wanted)
            self._check_memory()
            base = self._base_loss(self._outputs, targets)
        return self._bound(base)

    def cut(self, coords: np.ndarray) -> list[range]:
        """As :meth:`dzhpc.engines.full.Full.cut`."""
        return cut(self.index.owner(coords), CHUNK)

    @torch.no_grad()
    def differences(self, coords: Iterable[int], mu: float) -> Tensor:
        """As :meth:`dzhpc.engines.full.Full.differences`."""
        return self._one_by_one(coords, mu)

    @torch.no_grad()
    def responses(self, coords: Iterable[int], mu: float) -> Tensor:
        """z(theta + mu e_j) - z(theta) for each j in ``coords`` -> [n, *z.shape], by subtraction."""
        return self._responses_singly(coords, mu)

    def explain(self) -> str:
        """See :class:`dzhpc.engines.protocol.Engine`."""
        if self._tails is None:
            raise InputError("no batch was ever bound: call engine.bind(inputs, targets) first")
        traced, lines = self._tails.traced, ["engine reuse: what lies downstream of a parameter, one coordinate at a time"]
        for owner, name in enumerate(self.index.names):
            lines.append(f"{name}: {len(traced.downstream(owner))} of {len(traced.order)} operations")
        return "\n".join(lines)

    def _check_memory(self) -> None:
        if self._memory_mb is not None and self.peak_bytes > self._memory_mb * 2**20:
            raise InputError(
                f"zo.memory_mb = {self._memory_mb:g}: the kept features of this batch need {self.peak_bytes / 2**20:.0f} MiB; "
                f'raise it, use a smaller data.batch_size, or engine = "full"'
            )

    def _outputs_now(self, owner: int | None) -> Tensor:
        return self._tails.outputs(owner, self._outputs)


class Tails:
    """The tails of a traced network: the operations downstream of a parameter, or of any, made when they are first asked for."""

    def __init__(self, traced: Traced, parameters: int):
        self.traced = traced
        self._matters = closure([next(reversed(traced.order))], lambda node: node.all_input_nodes)  # else it is bookkeeping
        self._made: dict[tuple[fx.Node, ...], tuple[fx.GraphModule, list[fx.Node]]] = {}
        starts = {traced.users(owner) for owner in [*range(parameters), None]}
        self._frontiers = {users: self._frontier(users) for users in starts}
        #: what the base pass must keep
        self.wanted = frozenset(node for found in self._frontiers.values() for node in found or ())

    def outputs(self, parameter: int | None, base: Tensor) -> Tensor:
        """Outputs after a change of parameter number ``parameter``, of any if None; ``base`` where they do not depend on it.

        Buffers are those that the base pass found, or, of a module that had moved them before the tail begins, what it had made.
        """
        users = self.traced.users(parameter)
        frontier = self._frontiers[users]
        if frontier is None:
            return base
        if users not in self._made:
            self._made[users] = self._cut_off(users, frontier), self.traced.moved.begun(self._downstream(users))
        tail, begun = self._made[users]
        for node in begun:
            self.traced.moved.put_back(node)
        return tail(*map(self.traced.value, frontier))

    def _downstream(self, users: tuple[fx.Node, ...]) -> set[fx.Node]:
        return closure(users, lambda node: node.users) & self._matters

    def _frontier(self, users: tuple[fx.Node, ...]) -> list[fx.Node] | None:
        """The base values that a tail takes, in order; None where the output does not depend on ``users``."""
        downstream = self._downstream(users)
        if not downstream:
            return None
        found = {a for node in downstream for a in node.all_input_nodes if a not in downstream}
        return sorted(found, key=self.traced.order.get)

    def _cut_off(self, users: tuple[fx.Node, ...], frontier: list[fx.Node]) -> fx.GraphModule:
        """The operations downstream of ``users`` as a module of its own, over values of the frontier."""
        tail = fx.Graph()
        copies = {node: tail.placeholder(f"kept_{k}") for k, node in enumerate(frontier)}
        for node in sorted(self._downstream(users), key=self.traced.order.get):
            copies[node] = tail.node_copy(node, copies.__getitem__)
        return fx.GraphModule(self.traced.module, tail)
