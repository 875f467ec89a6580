"""Engine ``delta``: the change that each coordinate causes travels through the network, for a chunk of coordinates at once.

Two losses are never subtracted, so full relative precision is kept. Coordinates of one parameter share all weights downstream,
so a chunk of P coordinates is one batch of P B samples, and a change that lives in one channel stays there as long as it can.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from dzhpc.coordinates import cut
from dzhpc.engines import rules
from dzhpc.engines.full import LOSSES
from dzhpc.engines.reuse import Reuse
from dzhpc.engines.rules import Change, Operation
from dzhpc.errors import InputError

log = logging.getLogger("dzhpc")
MEMORY_MB = {"cpu": 64.0, "cuda": 4096.0}  # per device type, never a guess from the machine: chunks must not depend on it
LARGEST = 256  # coordinates in a chunk
COPIES = 6  # of the largest change downstream that are alive at once


@dataclass
class _Plan:
    nodes: list[fx.Node]  # from the parameter's operation to the output; empty where the output does not depend on it
    refusal: str  # why no chunk can be propagated
    widest: int  # bytes of the largest base value among the nodes


class Delta(Reuse):
    """As :class:`Reuse`, to more digits and at a fraction of its cost.

    Raises InputError where torch.fx cannot trace the model, or where ``memory_mb`` is too small for one coordinate.
    """

    def __init__(self, model: nn.Module, loss: str | Callable, memory_mb: float | None = None):
        super().__init__(model, loss)
        self._keep_all = True
        self._budget = (memory_mb or MEMORY_MB[self.index.device.type]) * 2**20
        self._loss_name = next((name for name, f in LOSSES.items() if f is self.loss), None)
        self._plans_of: object = None  # the network that the plans belong to
        self._plans: list[_Plan] = []
        self._said: set[str] = set()

    def cut(self, coords: np.ndarray) -> list[range]:
        """Runs of one parameter; so many coordinates that their changes fit into the memory budget."""
        owners = self.index.owner(coords)
        chunks, start = [], 0
        for chunk in cut(owners, len(coords) or 1):
            size = self._size(int(owners[chunk.start]))
            chunks += [range(k, min(k + size, chunk.stop)) for k in range(chunk.start, chunk.stop, size)]
        return chunks

    @torch.no_grad()
    def differences(self, coords, mu: float) -> Tensor:
        """l(theta + mu e_j) - l(theta) for each j in ``coords`` -> [n] in the parameters' dtype."""
        self._need_base()
        coords = np.asarray(coords, np.int64)
        order = np.argsort(coords, kind="stable")
        out = torch.zeros(len(coords), dtype=self.index.dtype, device=self.index.device)
        with self._unchanged():  # an operation without a rule runs as it is, its bookkeeping included
            for chunk in self.cut(coords[order]):
                where = order[chunk.start : chunk.stop]
                owner = int(self.index.owner(coords[where[:1]])[0])
                out[torch.from_numpy(where).to(out.device)] = self._chunk(owner, coords[where], mu)
        return out

    def _run_base(self) -> Tensor:
        outputs = super()._run_base()
        self._caches: dict[fx.Node, dict] = {}
        if self._plans_of is not self._network:
            self._plans_of, self._plans = self._network, [self._plan(k) for k in range(len(self.index.names))]
        return outputs

    def _plan(self, owner: int) -> _Plan:
        """What lies between a parameter and the output, and why it cannot be done in one pass, if it cannot."""
        users, nodes = self._network.users(owner), self._network.downstream(owner)
        refusal = ""
        if len(users) > 1:
            refusal = f"{self.index.names[owner]} is shared by {len(users)} operations"
        for node in nodes:
            if any(a in nodes for a in node.kwargs.values() if isinstance(a, fx.Node)):
                refusal = f"{_name(node)} takes a changing keyword argument"
            value = self._network.value(node) if node.op != "output" else node
            if not isinstance(value, (Tensor, fx.Node)) and rules.find(node, self._module(node)) is not rules.split:
                refusal = f"{_name(node)} gives no tensor"
            if node.op == "call_method" and node.target.endswith("_"):
                refusal = f"{_name(node)} overwrites a buffer that is read again"
        values = [self._network.value(node) for node in nodes[:-1]]
        widest = max((v.numel() * v.element_size() for v in values if isinstance(v, Tensor)), default=0)
        return _Plan(nodes, refusal, widest)

    def _size(self, owner: int) -> int:
        """How many coordinates of a parameter fit into the budget. Raises InputError if not one does."""
        self._need_base()
        bytes_each = max(1, COPIES * self._plans[owner].widest)
        if bytes_each > self._budget:
            raise InputError(
                f"zo.memory_mb = {self._budget / 2**20:g}: one coordinate of {self.index.names[owner]} needs "
                f"{bytes_each / 2**20:.1f} MiB at this batch size; raise it or use a smaller data.batch_size"
            )
        return int(min(LARGEST, self._budget // bytes_each))

    def _chunk(self, owner: int, coords: np.ndarray, mu: float) -> Tensor:
        """Differences of coordinates of one parameter -> [P]."""
        plan = self._plans[owner]
        seed = None
        if plan.nodes and not plan.refusal:
            seed = self._seed(plan.nodes[0], owner, coords - self.index.offsets[owner], mu)
            plan.refusal = "" if seed is not None else f"{_name(plan.nodes[0])} has no rule for its {self.index.names[owner]}"
        if seed is None:
            if plan.nodes:
                self._say_once(f"{plan.refusal}: evaluated one coordinate at a time")
            return super().differences(coords, mu)
        self.queries += len(coords)
        changes: dict[fx.Node, Change | list[Change]] = {plan.nodes[0]: seed}
        for node in plan.nodes[1:-1]:
            changes[node] = self._propagate(node, changes)
        output = plan.nodes[-1].args[0]
        return self._loss_difference(changes[output].dense(self._network.value(output)))

    def _seed(self, node: fx.Node, owner: int, local: np.ndarray, mu: float) -> Change | None:
        parameter = self.index.parameters[owner]
        if node.op == "get_attr":
            data = parameter.new_zeros(len(local), parameter.numel())
            data[torch.arange(len(local)), torch.from_numpy(local)] = mu
            return Change(data.view(len(local), *parameter.shape))
        module = self._module(node)
        name = next((name for name, p in module.named_parameters() if p is parameter), "")
        return rules.seed(self._operation(node, [None] * len(node.args)), name, local, mu)

    def _propagate(self, node: fx.Node, changes: dict) -> Change | list[Change]:
        def change_of(a):
            if isinstance(a, (list, tuple)):
                return [change_of(x) for x in a] if any(isinstance(x, fx.Node) for x in a) else None
            return changes.get(a) if isinstance(a, fx.Node) else None

        rule = rules.find(node, self._module(node))
        if rule is rules.fallback:
            self._say_once(f"{_name(node)} has no rule: evaluated one coordinate at a time")
        return rule(self._operation(node, [change_of(a) for a in node.args]))

    def _operation(self, node: fx.Node, changes: list) -> Operation:
        module = self._module(node)

        def run(args: tuple, kwargs: dict):
            if node.op == "call_method":
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            return (module or node.target)(*args, **kwargs)

        args, kwargs = (fx.map_arg(a, self._network.value) for a in (node.args, node.kwargs))
        cache = self._caches.setdefault(node, {})
        return Operation(run, args, kwargs, changes, self._network.value(node), module, cache)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._network.module.get_submodule(node.target) if node.op == "call_module" else None

    def _loss_difference(self, change: Tensor) -> Tensor:
        """[P] from the change of the outputs [P, B, ...]."""
        if self._loss_name == "cross_entropy":
            return cross_entropy_difference(self._outputs, change, self._targets).to(self.index.dtype)
        if self._loss_name == "mse":
            residual = self._outputs - self._targets
            return (change * (2 * residual + change)).flatten(1).mean(1)
        values = [self.loss(self._outputs + d, self._targets) - self._base for d in change]
        return self._stack(values)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.info("engine delta: %s", text)


def cross_entropy_difference(outputs: Tensor, change: Tensor, targets: Tensor) -> Tensor:
    """mean over the batch of log1p(sum p expm1(D)) - D_y, in float64; outputs [B, K], change [P, B, K], targets [B] -> [P]."""
    p, d = outputs.double().softmax(1), change.double()
    own = d.gather(2, targets[None, :, None].expand(len(d), -1, 1))[..., 0]
    return (torch.log1p((p * torch.expm1(d)).sum(2)) - own).mean(1)


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))
