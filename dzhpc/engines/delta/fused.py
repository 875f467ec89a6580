"""Neighbouring operations as few compiled passes over memory: their rules are traced together.

A trace is a function of tensors alone. They go by names, (operation, what), in the order in which they are passed: those of the
incoming changes, then base values and statistics, which the batch at hand has.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor, fx, nn

from dzhpc.engines.delta.change import Change, Origin
from dzhpc.engines.delta.layout import Layout, channels_apart, fills_vectors, is_apart
from dzhpc.engines.delta.operations import Changes, Operations
from dzhpc.engines.kernels.compiled import Program
from dzhpc.engines.kernels.symbolic import for_count, form

Given = dict[fx.Node, Change | Origin]
Key = tuple[fx.Node, str]


@dataclass
class Run:
    """Neighbouring operations, and the programs that carry changes through all of them."""

    nodes: tuple[fx.Node, ...]
    fused: bool
    programs: dict[tuple, "_Passes | None"] = field(default_factory=dict)  # for each kind of incoming changes

    @property
    def leaving(self) -> list[fx.Node]:
        """The operations whose changes others read."""
        return [node for node in self.nodes if any(user not in self.nodes for user in node.users)]


@dataclass(frozen=True)
class _Leaving:
    """One change that leaves a run."""

    node: fx.Node
    axis: int
    channel: int | None  # its place among the channels that come in, with those behind that the run itself made; None: dense


@dataclass
class _Passes:
    """Two programs over the same tensors: the sums that the run begins with, if it does, and everything else."""

    sums: Program | None
    rest: Program
    sources: list[Callable[[], Tensor]]  # what they read beside the changes, for the batch at hand
    leaving: list[_Leaving]

    def holds(self, count: int) -> bool:
        """Whether they are right for so many coordinates."""
        return self.rest.holds(count) and (self.sums is None or self.sums.holds(count))

    def __call__(self, moving: list[Tensor]) -> list[Tensor]:
        """From the tensors of the incoming changes the data of each that leaves, then the channels that the run made."""

        def tensor(k: int) -> Tensor:
            return moving[k] if k < len(moving) else self.sources[k - len(moving)]()

        sums = self.sums(tensor) if self.sums else []
        behind = len(moving) + len(self.sources)
        return self.rest(lambda k: sums[k - behind] if k >= behind else tensor(k))


class Fused:
    """Carries changes through merged runs."""

    def __init__(self, operations: Operations):
        self._operations, self._kernels = operations, operations.kernels

    def advance(self, run: Run, changes: dict[fx.Node, Change | Origin | list[Change]]) -> None:
        """Add to ``changes`` those that leave the run; each a :class:`Change` of [P, ...]."""
        if not self._kernels.compiling:
            return self._plainly(run, changes)
        inputs = (a for node in run.nodes for a in node.all_input_nodes if a in changes and a not in run.nodes)
        given = {a: self._laid_out(changes[a]) for a in inputs}
        moving = _tensors(given)
        axes = {key: _axis(key, t) for key, t in moving.items()}
        kind = (
            self._operations.network.value(run.nodes[0]).shape,  # an origin's own tensors do not all know the batch
            *((c.axis, c.name if isinstance(c, Origin) else None) for c in given.values()),
            *((key, form(t, axes[key])) for key, t in moving.items()),
        )
        count = next(t.shape[axes[key]] for key, t in moving.items() if axes[key] is not None)
        passes = for_count(run.programs, kind, count, lambda axes: self._trace(run, given, moving, axes), list(axes.values()))
        out = passes(list(moving.values()))
        channels = [*(c.channel for c in given.values()), *out[len(passes.leaving) :]]
        for left, data in zip(passes.leaving, out, strict=False):
            channel = None if left.channel is None else channels[left.channel]
            changes[left.node] = Change(data if channel is None else self._for_readers(left.node, data), channel, left.axis)

    def _plainly(self, run: Run, changes: dict[fx.Node, Change | Origin | list[Change]]) -> None:
        """The same, operation by operation: tracing takes seconds that no compiler earns back."""
        operations = self._operations
        inputs = {a: changes[a] for node in run.nodes for a in node.all_input_nodes if a in changes}
        known = {a: c.now() if isinstance(c, Origin) else c for a, c in inputs.items()}
        known = {a: Change(c.data.to(operations.dtype), c.channel, c.axis, c.means) for a, c in known.items()}
        last = {a: node for node in run.nodes for a in node.all_input_nodes}
        for node in run.nodes:
            incoming = operations.incoming(node, known)
            known[node] = operations.rule(node, incoming).function(operations.at_hand(node, incoming))
            if node in run.leaving:
                changes[node] = operations.travelling(known[node])
            for a in [a for a, reader in last.items() if reader is node]:
                known.pop(a, None)

    def _trace(self, run: Run, given: Given, moving: dict[Key, Tensor], axes: list[int | None]) -> _Passes:
        """The programs for incoming changes like these; axes: where each of ``moving`` has its coordinates."""
        operations, first, wanted = self._operations, run.nodes[0], run.leaving
        sources = self._sources(run, given)
        names, normed = [*moving, *sources], [node for node in run.nodes if operations.normalises(node)]
        tables = {node: len(operations.tables(node)) for node in run.nodes if operations.rule(node).tables}
        leaving: list[_Leaving] = []

        def unpacked(tensors: tuple[Tensor, ...]) -> tuple[Changes, dict[fx.Node, Tensor], dict[fx.Node, dict]]:
            """Incoming changes, base values, and what each operation finds in its cache."""
            named, dtype = dict(zip(names, tensors, strict=False)), operations.dtype
            changes = {a: _change(a, c, named) for a, c in given.items()}
            changes = {a: Change(c.data.to(dtype), c.channel, c.axis, c.means) for a, c in changes.items()}
            known = {a: named[a, what].to(operations.network.value(a).dtype) for a, what in sources if what == "value"}
            caches = {node: {"statistics": (named[node, "centred"].to(dtype), named[node, "scale"])} for node in normed}
            for node, count in tables.items():
                caches[node] = {"tables": tuple(named[node, f"table {k}"].to(dtype) for k in range(count))}
            return changes, known, caches

        def sums(*tensors: Tensor) -> list[Tensor]:
            changes, known, caches = unpacked(tensors)
            incoming = operations.incoming(first, changes)
            made = operations.rule(first).sums(operations.in_trace(first, incoming, known, caches[first]))
            return [t.contiguous() for t in made]  # a view of means would have strides that one coordinate does not tell

        def rest(*tensors: Tensor) -> list[Tensor]:
            changes, known, caches = unpacked(tensors)
            if len(tensors) > len(names):
                caches[first]["sums"] = tuple(tensors[len(names) :])
            channels = [c.channel for c in changes.values()]
            for node in run.nodes:
                incoming = operations.incoming(node, changes)
                operation = operations.in_trace(node, incoming, known, caches.get(node, {}))
                changes[node] = operations.rule(node, incoming).function(operation)
            leaving[:] = [_Leaving(a, changes[a].axis, _place(changes[a].channel, channels)) for a in wanted]
            return [*(operations.travelling(changes[a]).data for a in wanted), *channels[len(given) :]]

        tensors, program = [*moving.values(), *(source() for source in sources.values())], None
        axes, build = [*axes, *[None] * len(sources)], self._kernels.programs.build
        if first in normed and operations.rule(first).sums:
            program = build(sums, tensors, axes)
            made = program(tensors.__getitem__)
            tensors, axes = [*tensors, *made], [*axes, *[0 if any(a is not None for a in axes) else None] * len(made)]
        return _Passes(program, build(rest, tensors, axes), list(sources.values()), leaving)

    def _sources(self, run: Run, given: Given) -> dict[Key, Callable[[], Tensor]]:
        """Base values and statistics, as they lie beside the incoming changes."""
        operations = self._operations
        apart = all(c.channel is not None or (isinstance(c, Change) and is_apart(c.data)) for c in given.values())
        rounded = any(c.channel is None for c in given.values()) and operations.travel != operations.dtype
        layout, found = Layout(apart, rounded), {}
        for a in dict.fromkeys(a for node in run.nodes for a in (*node.all_input_nodes, node)):
            if isinstance(operations.network.value(a), Tensor):
                sharp = any(operations.rule(user).sharp for user in (*a.users, a) if user in run.nodes)
                found[a, "value"] = _later(operations.value, a, replace(layout, rounded=rounded and not sharp))
        for node in filter(operations.normalises, run.nodes):
            found[node, "centred"] = _later(operations.centred, node, layout)
            found[node, "scale"] = _later(operations.scale, node)
        for node in run.nodes:
            for k in range(len(operations.tables(node))):
                found[node, f"table {k}"] = _later(operations.table, node, k, replace(layout, rounded=False))
        return found

    def _laid_out(self, change: Change | Origin) -> Change | Origin:
        """Channels apart where rows of channels would leave a CPU's vectors half empty."""
        if isinstance(change, Origin) or change.channel is not None or change.data.ndim != 5:
            return change
        fits = change.data.device.type != "cpu" or fills_vectors(change.data.shape[2]) or is_apart(change.data)
        if fits or not self._kernels.programs.is_worth_it(change.data[0].numel()):
            return change
        return replace(change, data=self._kernels.call(channels_apart, change.data))

    def _for_readers(self, node: fx.Node, data: Tensor) -> Tensor:
        """A one-channel change that leaves a run, as convolutions read it best; a compiled pass that did this, too, is slow."""
        convolutions = [m for m in map(self._operations.module, node.users) if isinstance(m, nn.Conv2d)]
        return data if any(not fills_vectors(m.out_channels) for m in convolutions) else data.contiguous()


def _tensors(given: Given) -> dict[Key, Tensor]:
    """All that incoming changes, made or not, consist of."""
    found: dict[Key, Tensor] = {}
    for a, c in given.items():
        if isinstance(c, Origin):
            found |= {(a, f"origin {k}"): t for k, t in enumerate(c.tensors)}
        else:
            found |= {(a, "data"): c.data} | ({} if c.means is None else {(a, "means"): c.means})
        if c.channel is not None:
            found[a, "channel"] = c.channel
    return found


def _axis(key: Key, tensor: Tensor) -> int | None:
    """Where a tensor of an incoming change has its coordinates; None for one that belongs to all of them."""
    if key[1].startswith("origin"):
        return 0 if tensor.ndim == 1 and not tensor.is_floating_point() else None
    return 1 if key[1] == "means" else 0


def _change(a: fx.Node, like: Change | Origin, named: dict[Key, Tensor]) -> Change:
    """A change like a given one, of the tensors with these names."""
    if isinstance(like, Origin):
        own = [named[a, f"origin {k}"] for k in range(len(like.tensors))]
        return Change(like.make(*own), named.get((a, "channel")), like.axis)
    return Change(named[a, "data"], named.get((a, "channel")), like.axis, named.get((a, "means")))


def _place(channel: Tensor | None, channels: list[Tensor | None]) -> int | None:
    """Which one of the channels this is; a new one is put behind them."""
    if channel is None:
        return None
    known = next((k for k, own in enumerate(channels) if own is channel), len(channels))
    if known == len(channels):
        channels.append(channel)
    return known


def _later(function: Callable[..., Tensor], *args) -> Callable[[], Tensor]:
    return lambda: function(*args)
