"""Carries the changes of a chunk through the operations of a traced network, run by run.

A run is one operation, or neighbours that the compiler merges into few passes over memory. Changes of whole values travel in the
engine's precision, changes of single channels (which are small) in the parameters' type; statistics are always of that type.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, fx, nn

from dzhpc.engines.delta import origins as seeds
from dzhpc.engines.delta import rules
from dzhpc.engines.delta.change import Change, Operation, Seed, channels_apart, fills_vectors, flat, is_apart
from dzhpc.engines.kernels.compiled import Program, Programs
from dzhpc.engines.traced import Traced, name_of


@dataclass
class Run:
    """Neighbouring operations and the programs that carry changes through all of them."""

    nodes: tuple[fx.Node, ...]
    fused: bool
    programs: dict[tuple, "_Passes"] = field(default_factory=dict)  # for each kind of incoming changes

    @property
    def leaving(self) -> list[fx.Node]:
        """The operations whose changes others read."""
        return [node for node in self.nodes if any(user not in self.nodes for user in node.users)]


@dataclass
class _Passes:
    """Two programs over the same tensors: the sums that a BatchNorm at the run's beginning needs, and everything else."""

    sums: Program | None
    rest: Program
    sources: list[Callable[[], Tensor]]  # what the programs read beside the changes, for the batch at hand
    leaving: list[tuple[fx.Node, int | None, int]]  # of each output: operation, whose channels, axis


class Propagation:
    """The rules of a network's operations, applied to the base values of the batch that it ran last."""

    def __init__(self, network: Traced, dtype: torch.dtype, travel: torch.dtype, programs: Programs, say: Callable[[str], None]):
        self.network, self._dtype, self._travel = network, dtype, travel
        self._programs, self._say = programs, say
        self._runs: dict[tuple[fx.Node, ...], Run] = {}
        self._caches: dict[fx.Node, dict] = {}
        self._compile_rules = True

    def new_batch(self) -> None:
        """Forget what was derived from the last batch's base values."""
        self._caches.clear()

    @property
    def storages(self) -> dict[int, int]:
        """{address: bytes} of the memory of what was derived from the batch's base values."""
        found = [t for cache in self._caches.values() for v in cache.values() for t in (v if isinstance(v, tuple) else (v,))]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}

    def seed(self, node: fx.Node, parameter: Tensor, local: np.ndarray, mu: float) -> Seed | None:
        """Where the chunk of a parameter's coordinates ``local`` [P] begins: ``node`` reads it; None where no rule is known."""
        if node.op == "get_attr":
            return seeds.of_parameter(parameter, local, mu)
        module = self._module(node)
        name = next(name for name, p in module.named_parameters() if p is parameter)
        return seeds.seed(self._operation(node, [None] * len(node.args)), name, local, mu)

    def has_kink(self, nodes: list[fx.Node]) -> bool:
        """Whether some of the operations have a kink."""
        return any(self._rule(node) in rules.KINKED for node in nodes if node.op != "output")

    def waits(self, node: fx.Node, runs: list[Run]) -> bool:
        """Whether a seed may be left to the first run, which makes it in its registers."""
        return bool(runs) and runs[0].fused and self._programs.compiling and all(u in runs[0].nodes for u in node.users)

    def try_out(self, nodes: list[fx.Node], changes: dict[fx.Node, Change | list[Change]]) -> None:
        """Add to ``changes`` those of all nodes, one by one and without a compiler."""
        self._compile_rules = False
        for node in nodes:
            changes[node] = self.step(node, changes)
        self._compile_rules = True

    def step(self, node: fx.Node, changes: dict[fx.Node, Change | list[Change]]) -> Change | list[Change]:
        """The change of one operation's output, given those of its inputs."""
        incoming = self._incoming(node, changes)
        rule = self._rule(node, incoming)
        if rule is rules.fallback:
            self._say(f"{name_of(node)} has no rule: evaluated one coordinate at a time")
        if rule not in rules.NATIVE:
            incoming = _each(incoming, lambda c: c.to(self._dtype, self._dtype))
        operation = self._operation(node, incoming)
        if rule is not rules.convolution:
            return _each(rule(operation), self._travelling)
        if operation.compiled:
            operation = replace(operation, winograd=self._programs.winograd, centred=self._centred_behind(node))
        change = rule(operation)
        return replace(self._travelling(change), means=change.means)

    def _centred_behind(self, node: fx.Node) -> Callable[[], Tensor] | None:
        """The centred value of a node that a BatchNorm reads, as it lies beside the changes of that."""
        norm = next((user for user in node.users if self._has_statistics(user) and self._rule(user) is rules.batch_norm), None)
        return None if norm is None else self._statistic(norm, 0, False, self._travel != self._dtype)

    def runs(self, nodes: list[fx.Node], changes: dict[fx.Node, Change | list[Change]]) -> list[Run]:
        """The nodes in order, grouped; a BatchNorm begins a run. ``changes`` says what kind of change each one gets."""
        fusable = {node for node in nodes if self._is_fusable(node, changes)}
        groups: list[list[fx.Node]] = []
        for node in _scheduled(nodes, fusable):
            if node not in fusable or not groups or groups[-1][-1] not in fusable or self._rule(node) is rules.batch_norm:
                groups.append([])
            groups[-1].append(node)
        return [self._runs.setdefault(tuple(g), Run(tuple(g), g[0] in fusable)) for g in groups]

    def advance(self, run: Run, changes: dict[fx.Node, Change | list[Change]]) -> None:
        """Add to ``changes`` those that leave the run."""
        if run.fused:
            self._advance_fused(run, changes)
        else:
            changes[run.nodes[0]] = self.step(run.nodes[0], changes)

    def _advance_fused(self, run: Run, changes: dict) -> None:
        inputs = (a for node in run.nodes for a in node.all_input_nodes if a in changes and a not in run.nodes)
        given = {a: self._laid_out(changes[a]) for a in inputs}
        kind = tuple(
            (a, c.axis, getattr(c, "name", None), *((t.shape, t.stride()) for t in _tensors(c))) for a, c in given.items()
        )
        kind = (self.network.value(run.nodes[0]).shape, *kind)  # a seed's own tensors do not all know the batch
        moving = [t for c in given.values() for t in _tensors(c)]
        if kind not in run.programs:
            run.programs[kind] = self._compile(run, given, moving)
        passes = run.programs[kind]
        sources = passes.sources

        def tensor(k: int) -> Tensor:
            return moving[k] if k < len(moving) else sources[k - len(moving)]()

        coefficients = passes.sums(tensor) if passes.sums else []
        after = len(moving) + len(sources)
        out = passes.rest(lambda k: coefficients[k - after] if k >= after else tensor(k))
        channels = [c.channel for c in given.values()]  # padding moves channels, so that two changes may differ in theirs
        for (node, whose, axis), data in zip(passes.leaving, out, strict=True):
            channel = None if whose is None else channels[whose]
            changes[node] = Change(data if channel is None else self._for_readers(node, data), channel, axis)

    def _compile(self, run: Run, given: dict[fx.Node, Change], moving: list[Tensor]) -> _Passes:
        """Trace the rules of a run over tensors: incoming changes, base values, statistics."""
        apart = all(c.channel is not None or (isinstance(c, Change) and is_apart(c.data)) for c in given.values())
        rounded = any(c.channel is None for c in given.values()) and self._travel != self._dtype
        base = dict.fromkeys(a for node in run.nodes for a in (*node.all_input_nodes, node))
        base = [a for a in base if isinstance(self.network.value(a), Tensor)]
        normed = [node for node in run.nodes if self._has_statistics(node)]
        sources = [self._source(a, run, apart, rounded) for a in base]
        for node in normed:
            sources += [self._statistic(node, 0, apart, rounded), self._statistic(node, 1, apart, rounded)]

        def unpack(tensors: tuple[Tensor, ...]):
            rest, changes = list(tensors), {}
            for a, c in given.items():
                own = [rest.pop(0) for _ in _tensors(c)]
                channel = None if c.channel is None else own.pop()
                means = None if isinstance(c, Seed) or c.means is None else own.pop()
                changes[a] = Change((c.make(*own) if isinstance(c, Seed) else own[0]).to(self._dtype), channel, c.axis, means)
            known = {a: rest.pop(0).to(self.network.value(a).dtype) for a in base}
            caches = {node: {"statistics": (rest.pop(0).to(self._dtype), rest.pop(0))} for node in normed}
            return changes, known, caches, rest

        def sums(*tensors: Tensor) -> list[Tensor]:
            changes, known, caches, _ = unpack(tensors)
            node = run.nodes[0]
            return list(rules.batch_coefficients(self._operation(node, self._incoming(node, changes), known, caches[node])))

        def rest_of_it(*tensors: Tensor) -> list[Tensor]:
            changes, known, caches, coefficients = unpack(tensors)
            whose = {id(changes[a].channel): k for k, a in enumerate(given) if changes[a].channel is not None}
            if coefficients:
                caches[run.nodes[0]]["coefficients"] = tuple(coefficients)
            for node in run.nodes:
                incoming = self._incoming(node, changes)
                changes[node] = self._rule(node, incoming)(self._operation(node, incoming, known, caches.get(node, {})))
            leaving[:] = [(node, whose.get(id(changes[node].channel)), changes[node].axis) for node in wanted]
            return [self._travelling(changes[node]).data for node in wanted]

        wanted = run.leaving
        leaving: list[tuple[fx.Node, int | None, int]] = []
        tensors = [*moving, *(source() for source in sources)]
        first = None
        if normed and self._rule(run.nodes[0]) is rules.batch_norm:
            first = self._programs.build(sums, tensors)
            tensors += first(tensors.__getitem__)
        return _Passes(first, self._programs.build(rest_of_it, tensors), sources, leaving)

    def _laid_out(self, change: Change | Seed) -> Change | Seed:
        """Channels apart where rows of channels would leave a CPU's vectors half empty."""
        if isinstance(change, Seed) or change.channel is not None or change.data.ndim != 5:
            return change
        fits = change.data.device.type != "cpu" or fills_vectors(change.data.shape[2]) or is_apart(change.data)
        if fits or not self._programs.is_worth_it(change.data.numel()):
            return change
        return replace(change, data=self._programs.call(channels_apart, change.data))

    def _for_readers(self, node: fx.Node, data: Tensor) -> Tensor:
        """A one-channel change that leaves a run, as convolutions read it best; a compiled pass that did this, too, is slow."""
        convolutions = [m for m in map(self._module, node.users) if isinstance(m, nn.Conv2d)]
        return data if any(not fills_vectors(m.out_channels) for m in convolutions) else data.contiguous()

    def _source(self, node: fx.Node, run: Run, apart: bool, rounded: bool) -> Callable[[], Tensor]:
        """A base value, laid out as the changes beside it; rounded beside dense ones that are rounded too."""
        sharp = any(self._rule(user) in rules.SHARP for user in (*node.users, node) if user in run.nodes)
        return lambda: self._beside(node, "value", lambda: self.network.value(node), apart, rounded and not sharp)

    def _statistic(self, node: fx.Node, which: int, apart: bool, rounded: bool) -> Callable[[], Tensor]:
        """The centred input (0) or the scale s (1) of a normalisation."""

        def values() -> Tensor:
            return rules.STATISTICS[self._rule(node)](self._operation(node, [None] * len(node.args)))[which]

        return values if which else lambda: self._beside(node, "centred", values, apart, rounded)

    def _beside(self, node: fx.Node, name: str, make: Callable[[], Tensor], apart: bool, rounded: bool) -> Tensor:
        cache, key = self._caches.setdefault(node, {}), (name, apart, rounded)
        if key not in cache:
            value = make()
            if apart and value.ndim == 4:
                value = channels_apart(value)
            if rounded and value.dtype == self._dtype:
                value = value.to(self._travel)
            cache[key] = value
        return cache[key]

    def _has_statistics(self, node: fx.Node) -> bool:
        module = self._module(node)
        is_batch_norm = self._rule(node) is rules.batch_norm
        return self._rule(node) in rules.STATISTICS and (not is_batch_norm or rules.uses_batch_statistics(module))

    def _is_fusable(self, node: fx.Node, changes: dict) -> bool:
        incoming = [c for c in self._incoming(node, changes) if c is not None]
        return self._rule(node, incoming) in rules.FUSABLE and all(isinstance(c, Change) for c in incoming)

    def _rule(self, node: fx.Node, incoming: list | None = None) -> rules.Rule:
        """The rule of an operation; :func:`rules.fallback` too where more of its inputs change than the rule knows of."""
        rule = rules.find(node, self._module(node))
        several = incoming is not None and any(c is not None for c in incoming[1:])
        return rules.fallback if several and rule not in rules.SEVERAL else rule

    def _incoming(self, node: fx.Node, changes: dict) -> list:
        """The changes of an operation's arguments, parallel to them."""
        return [_change_of(a, changes) for a in node.args]

    def _operation(self, node: fx.Node, incoming: list, known: dict | None = None, cache: dict | None = None) -> Operation:
        """A node with its base values: those of ``known`` (while tracing), else the batch's own."""
        module = self._module(node)

        def value(a: fx.Node):
            return known[a] if known is not None and a in known else self.network.value(a)

        def run(args: tuple, kwargs: dict):
            self.network.moved.put_back(node)
            if node.op == "call_method":
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            return (module or node.target)(*args, **kwargs)

        args, kwargs = (fx.map_arg(a, value) for a in (node.args, node.kwargs))
        changed = [len(c.data) for c in flat(incoming) if c is not None] if self._compile_rules and cache is None else []
        elements = max(changed, default=0) * (value(node).numel() if isinstance(value(node), Tensor) else 0)
        compiled = self._programs.call if self._programs.is_worth_it(elements) else None
        cache = self._caches.setdefault(node, {}) if cache is None else cache
        return Operation(run, args, kwargs, incoming, value(node), module, cache, compiled)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.network.module.get_submodule(node.target) if node.op == "call_module" else None

    def _travelling(self, change: Change) -> Change:
        return change.to(self._travel, self._dtype)


def _change_of(a, changes: dict):
    """The change of an argument, which may be a list. No closure: one that calls itself would keep all changes until gc runs."""
    if isinstance(a, (list, tuple)):
        return [_change_of(x, changes) for x in a] if any(isinstance(x, fx.Node) and x in changes for x in a) else None
    return changes.get(a) if isinstance(a, fx.Node) else None


def _tensors(change: Change | Seed) -> list[Tensor]:
    """All that a change, made or not, consists of; its channel is last, its means before."""
    data = change.tensors if isinstance(change, Seed) else [change.data]
    if isinstance(change, Change) and change.means is not None:
        data = [*data, change.means]
    return data if change.channel is None else [*data, change.channel]


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
