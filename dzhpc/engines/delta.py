"""Engine ``delta``: the change that each coordinate causes travels through the network, for a chunk of coordinates at once.

Two losses are never subtracted, so full relative precision is kept. Coordinates of one parameter share all weights downstream,
so a chunk of P coordinates is one batch of P B samples, and a change that lives in one channel stays there as long as it can.
"""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from dzhpc.coordinates import cut
from dzhpc.engines import rules
from dzhpc.engines.full import LOSSES, checked
from dzhpc.engines.reuse import Reuse
from dzhpc.engines.rules import Change, Operation
from dzhpc.errors import InputError

log = logging.getLogger("dzhpc")
BUDGET_MB = {"cpu": 8.0, "cuda": 4096.0}  # for a chunk's changes: a core's cache, a GPU's fill; never a guess from the machine
LARGEST = 256  # coordinates in a chunk
COMPILERS = (os.environ.get("CXX", "g++"), "g++", "clang++")
COPIES = 4  # of the largest change downstream that are alive at once


@dataclass
class _Plan:
    nodes: list[fx.Node]  # from the parameter's operation to the output; empty where the output does not depend on it
    refusal: str  # why no chunk can be propagated
    widest: int  # bytes of the largest change that one coordinate makes
    runs: list[list[fx.Node]]  # the nodes between, grouped as they are evaluated


class Delta(Reuse):
    """As :class:`Reuse`, to more digits and at a fraction of its cost.

    Raises InputError where torch.fx cannot trace the model, or where ``memory_mb`` is too small for one coordinate.
    """

    def __init__(self, model: nn.Module, loss: str | Callable, memory_mb: float | None = None):
        super().__init__(model, loss)
        self._keep_all = True
        self._limit = memory_mb * 2**20 if memory_mb else None
        self._loss_name = next((name for name, f in LOSSES.items() if f is self.loss), None)
        self._plans_of: object = None  # the network that the plans belong to
        self._plans: list[_Plan] = []
        self._said: set[str] = set()
        self._fusable: set[fx.Node] = set()
        self._programs: dict[tuple, tuple] = {}
        self._compiled_code: dict[tuple, Callable] = {}

    def cut(self, coords: np.ndarray) -> list[range]:
        """Runs of one parameter; so many coordinates that their changes fit into the memory budget."""
        owners = self.index.owner(coords)
        chunks = []
        for chunk in cut(owners, len(coords) or 1):
            size = self._size(int(owners[chunk.start]))
            chunks += [range(k, min(k + size, chunk.stop)) for k in range(chunk.start, chunk.stop, size)]
        return chunks

    @torch.no_grad()
    def differences(self, coords, mu: float) -> Tensor:
        """l(theta + mu e_j) - l(theta) for each j in ``coords`` -> [n] in the parameters' dtype."""
        self._need_base()
        coords = np.array(checked(coords), np.int64)
        order = np.argsort(coords, kind="stable")
        out = torch.zeros(len(coords), dtype=self.index.dtype, device=self.index.device)
        with self._unchanged():  # an operation without a rule runs as it is, its bookkeeping included
            for chunk in self.cut(coords[order]):
                where = order[chunk.start : chunk.stop]
                owner = int(self.index.owner(coords[where[:1]])[0])
                if self._plans[owner].refusal or not self._plans[owner].nodes:
                    out[torch.from_numpy(where).to(out.device)] = self._one_by_one(owner, coords[where], mu)
                    continue
                padded = np.pad(coords[where], (0, self._size(owner) - len(where)), mode="edge")  # one shape, one program
                out[torch.from_numpy(where).to(out.device)] = self._chunk(owner, padded, mu)[: len(where)]
                self.queries -= len(padded) - len(where)
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
        plan = _Plan(nodes, refusal, 0, self._runs(nodes[1:-1]))
        if nodes and not refusal:
            self._try_one(plan, owner)
        return plan

    def _try_one(self, plan: _Plan, owner: int) -> None:
        """Propagate one coordinate to learn how large its changes are, and whether its operation has a seed for it."""
        seed = self._seed(plan.nodes[0], owner, np.zeros(1, np.int64), 1e-3)
        if seed is None:
            plan.refusal = f"{_name(plan.nodes[0])} has no rule for its {self.index.names[owner]}"
            return
        changes = {plan.nodes[0]: seed}
        for node in plan.nodes[1:-1]:
            changes[node] = self._propagate(node, changes)
        sizes = [c.data.numel() * c.data.element_size() for c in rules.flat(list(changes.values()))]
        plan.widest = max(sizes)

    def _runs(self, nodes: list[fx.Node]) -> list[list[fx.Node]]:
        """The nodes in order, neighbours that the compiler may merge together; a BatchNorm begins a run, its sums come before."""
        runs: list[list[fx.Node]] = []
        for node in nodes:
            rule = rules.find(node, self._module(node))
            if rule in rules.FUSABLE:
                self._fusable.add(node)
            starts = rule is rules.batch_norm or node not in self._fusable or not runs or runs[-1][-1] not in self._fusable
            if starts:
                runs.append([])
            runs[-1].append(node)
        return runs

    def _fused(self, run: list[fx.Node], changes: dict) -> dict[fx.Node, Change]:
        """Propagate through a run of fusable operations in compiled passes: first the sums of its BatchNorm, then the rest."""
        given = {a: changes[a] for node in run for a in node.all_input_nodes if a in changes and a not in run}
        kind = tuple((a, *c.data.shape, c.data.dtype, c.channel is None, c.axis) for a, c in given.items())
        one_channel = any(c.channel is not None for c in given.values())
        base = [a for node in run for a in (*node.all_input_nodes, node) if isinstance(self._network.value(a), Tensor)]
        base = list(dict.fromkeys(base))
        values = [self._laid_out(a, one_channel) for a in base]
        module = self._module(run[0])
        norm = rules.find(run[0], module) is rules.batch_norm and rules.uses_batch_statistics(module)
        statistics = list(self._statistics(run[0], one_channel)) if norm else []
        tensors = [t for c in given.values() for t in (c.data, c.channel) if t is not None] + values + statistics

        def environment(flat: tuple[Tensor, ...]):
            rest, env = list(flat), {}
            for a, c in given.items():
                data = rest.pop(0)
                env[a] = Change(data, None if c.channel is None else rest.pop(0), c.axis)
            known = {a: rest.pop(0) for a in base}
            return env, known, rest

        def sums(*flat: Tensor):
            env, known, rest = environment(flat)
            return rules.batch_coefficients(
                self._operation(run[0], self._inputs_of(run[0], env), known, {"statistics": tuple(rest[:2])})
            )

        def apply(*flat: Tensor):
            env, known, rest = environment(flat)
            cache = {"statistics": tuple(rest[:2]), "coefficients": tuple(rest[2:])} if norm else {}
            for node in run:
                rule = rules.find(node, self._module(node))
                env[node] = rule(self._operation(node, self._inputs_of(node, env), known, cache if node is run[0] else {}))
            layout[:] = [(env[node].channel is None, env[node].axis) for node in wanted]
            return [env[node].data for node in wanted]

        wanted = [node for node in run if any(user not in run for user in node.users)]
        layout: list[tuple[bool, int]] = []
        if norm:
            tensors += self._compiled(("sums", tuple(run), kind), sums, tensors)[0]
        out, layout = self._compiled(("apply", tuple(run), kind), apply, tensors, layout)
        channel = next((c.channel for c in given.values() if c.channel is not None), None)
        return {
            node: Change(data, None if dense else channel, axis)
            for node, data, (dense, axis) in zip(wanted, out, layout, strict=True)
        }

    def _compiled(self, key: tuple, function: Callable, tensors: list[Tensor], layout: list | None = None):
        """(outputs, layout) of a function compiled for exactly these shapes; equal programs are compiled once."""
        if key not in self._programs:
            traced = make_fx(function)(*tensors)
            constants = lift_constants(traced)
            shapes = tuple((t.shape, t.stride(), t.dtype) for t in [*tensors, *constants])
            program = self._compiled_code.setdefault((traced.code, shapes), self._compile(traced.forward))
            self._programs[key] = (program, constants, list(layout or []))
        program, constants, layout = self._programs[key]
        return list(program(*tensors, *constants)), layout

    def _compile(self, function: Callable) -> Callable:
        """float64 is for comparisons, and not worth a compiler's seconds."""
        if self.index.dtype == torch.float64 or (self.index.device.type == "cpu" and not any(map(shutil.which, COMPILERS))):
            self._say_once("not compiled: float64, or no C++ compiler (g++ or clang++) was found")
            return function
        return torch.compile(function, dynamic=False)

    def _laid_out(self, node: fx.Node, one_channel: bool) -> Tensor:
        """A base value; channel-major for a run that reads single channels of it."""
        value = self._network.value(node)
        return _channel_major(value, self._caches.setdefault(node, {})) if one_channel and value.ndim == 4 else value

    def _statistics(self, node: fx.Node, one_channel: bool) -> tuple[Tensor, Tensor]:
        operation = self._operation(node, [None])
        centred, s = rules.batch_statistics(operation)
        return (_channel_major(centred, operation.cache, "centred") if one_channel and centred.ndim == 4 else centred), s

    def _inputs_of(self, node: fx.Node, changes: dict) -> list:
        def change_of(a):
            if isinstance(a, (list, tuple)):
                return [change_of(x) for x in a] if any(isinstance(x, fx.Node) for x in a) else None
            return changes.get(a) if isinstance(a, fx.Node) else None

        return [change_of(a) for a in node.args]

    def _size(self, owner: int) -> int:
        """How many coordinates of a parameter fit into the budget. Raises InputError if not one does."""
        if not self._plans:  # they outlive a batch: sizes depend on shapes alone
            self._need_base()
        bytes_each = max(1, COPIES * self._plans[owner].widest)
        if self._limit is not None and bytes_each > self._limit:
            raise InputError(
                f"zo.memory_mb = {self._limit / 2**20:g}: one coordinate of {self.index.names[owner]} needs "
                f"{bytes_each / 2**20:.1f} MiB at this batch size; raise it or use a smaller data.batch_size"
            )
        budget = self._limit or BUDGET_MB[self.index.device.type] * 2**20
        fits = int(max(1, min(LARGEST, budget // bytes_each, 2 * self.index.parameters[owner].numel() - 1)))
        return 1 << (fits.bit_length() - 1)  # a power of two: fewer shapes to compile

    def _one_by_one(self, owner: int, coords: np.ndarray, mu: float) -> Tensor:
        """The exact way out, for parameters that no rule serves."""
        if self._plans[owner].refusal:
            self._say_once(f"{self._plans[owner].refusal}: evaluated one coordinate at a time")
        return Reuse.differences(self, coords, mu)

    def _chunk(self, owner: int, coords: np.ndarray, mu: float) -> Tensor:
        """Differences of coordinates of one parameter -> [P]."""
        plan = self._plans[owner]
        seed = self._seed(plan.nodes[0], owner, coords - self.index.offsets[owner], mu)
        self.queries += len(coords)
        changes: dict[fx.Node, Change | list[Change]] = {plan.nodes[0]: seed}
        for run in plan.runs:
            if len(run) == 1 and run[0] not in self._fusable:
                changes[run[0]] = self._propagate(run[0], changes)
            else:
                changes.update(self._fused(run, changes))
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
        rule = rules.find(node, self._module(node))
        if rule is rules.fallback:
            self._say_once(f"{_name(node)} has no rule: evaluated one coordinate at a time")
        return rule(self._operation(node, self._inputs_of(node, changes)))

    def _operation(self, node: fx.Node, changes: list, known: dict | None = None, cache: dict | None = None) -> Operation:
        """A node with its base values: those of ``known`` (while tracing), else the batch's own."""
        module = self._module(node)

        def value(a: fx.Node):
            return known[a] if known is not None and a in known else self._network.value(a)

        def run(args: tuple, kwargs: dict):
            if node.op == "call_method":
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            return (module or node.target)(*args, **kwargs)

        args, kwargs = (fx.map_arg(a, value) for a in (node.args, node.kwargs))
        cache = self._caches.setdefault(node, {}) if cache is None else cache
        return Operation(run, args, kwargs, changes, value(node), module, cache)

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


def _channel_major(value: Tensor, cache: dict, name: str = "channel-major") -> Tensor:
    """The same values [B, C, H, W], each channel contiguous, made once a batch."""
    if name not in cache:
        cache[name] = value.transpose(0, 1).contiguous().transpose(0, 1)
    return cache[name]


def lift_constants(traced: fx.GraphModule) -> list[Tensor]:
    """Turn the tensors that a trace holds (parameters) into inputs behind the others, so that equal code is equal."""
    graph, constants = traced.graph, []
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        constants.append(getattr(traced, node.target))
        with graph.inserting_after(last):
            last = graph.placeholder(f"constant_{len(constants)}")
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    traced.recompile()
    return constants
