"""Which operations of a traced network write to buffers, and what each of them found there."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx


class Moved:
    """Buffers that operations of a graph move: seen in one watched pass, noted in every later one.

    An operation that reads what an earlier one has written depends on it, but no edge of the graph says so.
    """

    def __init__(self, module: fx.GraphModule):
        self._module = module
        self._names = {address: name for name, b in module.named_buffers() if (address := address_of(b))}
        self._read: dict[fx.Node, set[str]] = {}  # which buffers an operation takes; what it writes to, too
        self._written: dict[fx.Node, set[str]] = {}
        self._found: dict[fx.Node, list[Tensor]] = {}  # in the buffers of a module that writes, at its time in the base pass
        self._before: dict[str, tuple[Tensor, int, Tensor]] = {}  # of the operation under way: buffer, its version and value

    def watch(self, node: fx.Node, arguments: Iterable[object]) -> None:
        """An operation begins, on these values."""
        tensors = [*self._own(node), *(a for a in arguments if isinstance(a, Tensor))]
        taken = {name: t for t in tensors if (name := self._names.get(address_of(t)))}
        self._read[node] = set(taken)
        self._before = {name: (t, t._version, t.clone()) for name, t in taken.items()}

    def watched(self, node: fx.Node) -> None:
        """It has ended."""
        moved = {name for name, (t, version, value) in self._before.items() if t._version != version or differ(t, value)}
        if moved:
            self._written[node] = moved

    def conflict(self) -> str:
        """What the forward pass does that cannot be repeated in part; "" if nothing.

        A buffer that is written and later read, where the output depends on it, or that was given other memory.
        """
        now = {name: address_of(b) for name, b in self._module.named_buffers()}
        if other := [name for address, name in self._names.items() if now.get(name) != address]:
            return f"gives its buffer {other[0]} other memory"
        *order, output = self._module.graph.nodes
        matters = closure([output], lambda node: node.all_input_nodes)
        for k, writer in enumerate(order):
            for reader in order[k + 1 :] if writer in self._written else ():
                both = self._written[writer] & self._read.get(reader, set())
                if both and reader in matters and self._leaf(reader) is not (self._leaf(writer) or writer):
                    return f"overwrites its buffer {min(both)} (by {name_of(writer)}) and reads it again (by {name_of(reader)})"
        return ""

    def moves(self, buffer: Tensor) -> bool:
        """Whether some operation writes to a buffer."""
        name = self._names.get(address_of(buffer))
        return any(name in names for names in self._written.values())

    def writes(self, node: fx.Node) -> bool:
        """Whether a module moves its own buffers."""
        return node.op == "call_module" and node in self._written

    def note(self, node: fx.Node, module: fx.GraphModule) -> None:
        """A base pass comes to a module that writes; ``module`` is what runs, the graph's own or a copy in another type."""
        theirs = module.get_submodule(node.target).buffers()
        self._found[node] = [b.to(own.dtype, copy=True) for own, b in zip(self._own(node), theirs, strict=True)]

    @torch.no_grad()
    def put_back(self, node: fx.Node) -> None:
        """The buffers of a module that writes are what it found in the base pass."""
        for buffer, value in zip(self._own(node), self._found.get(node, []), strict=node in self._found):
            buffer.copy_(value)

    def begun(self, part: Iterable[fx.Node]) -> list[fx.Node]:
        """Where the modules that write come first in ``part``, of those that have run before and outside."""
        inside, outside, found = set(part), set(), {}
        for node in filter(self.writes, self._module.graph.nodes):
            leaf = self._leaf(node)
            if node not in inside:
                outside.add(leaf)
            elif leaf in outside:
                found.setdefault(leaf, node)
        return list(found.values())

    def _leaf(self, node: fx.Node) -> torch.nn.Module | None:
        return self._module.get_submodule(node.target) if node.op == "call_module" else None

    def _own(self, node: fx.Node) -> list[Tensor]:
        return list(leaf.buffers()) if (leaf := self._leaf(node)) is not None else []


def name_of(node: fx.Node) -> str:
    """What a user would call an operation."""
    return getattr(node.target, "__name__", str(node.target))


def address_of(tensor: Tensor) -> int:
    """Of its memory; 0 where it has none of its own (sparse, empty)."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and type hold different numbers; NaN equals NaN. Sparse ones are not looked into."""
    looked = a.layout == torch.strided and not a.is_quantized
    return looked and not bool(((a == b) | ((a != a) & (b != b))).all())


def scale_of(values: Tensor) -> float:
    """The largest finite absolute value, 0 where there is none."""
    return float(values.detach().abs().nan_to_num(0, 0, 0).max()) if values.numel() else 0.0


def closure(start: Iterable[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """All nodes reached from ``start``, those included."""
    found, stack = set(start), list(start)
    while stack:
        fresh = [node for node in neighbours(stack.pop()) if node not in found]
        found.update(fresh)
        stack += fresh
    return found
