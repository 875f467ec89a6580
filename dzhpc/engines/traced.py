"""The traced network (torch.fx): what lies downstream of each parameter, and what must be kept to start there.

Tracing keeps PyTorch's own modules whole and looks into everybody else's. In-place operations would overwrite kept features, so
they are replaced by their out-of-place forms, and later readers of the overwritten value read the result instead.
"""

import copy
import inspect
import operator
import os
import traceback

import torch
from torch import Tensor, fx

from dzhpc.errors import InputError

OUT_OF_PLACE = {
    getattr(operator, f"i{name.rstrip('_')}"): getattr(operator, name)
    for name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "matmul", "pow", "and_", "or_", "xor", "lshift", "rshift"]
}


class Network:
    """A module as a graph of operations. ``run`` is the base pass; ``tail`` re-runs what depends on one parameter, or on any.

    engine: who asks, for the errors. whole: layers of users that are kept whole, too. Raises InputError if torch.fx cannot trace
    the module, or if it overwrites a value in a way that cannot be undone.
    """

    def __init__(self, model: torch.nn.Module, parameters: list[Tensor], keep_all: bool = False, engine: str = "reuse", whole=()):
        name = type(model).__name__
        graph = _trace(model, name, engine, whole)
        self.module = fx.GraphModule(model, graph)
        _remove_in_place(self.module, name, engine)
        _take_by_position(self.module)
        self._order = {node: k for k, node in enumerate(self.module.graph.nodes)}
        self._users = [self._nodes_using(p) for p in parameters]
        self._all_users = tuple(sorted({node for users in self._users for node in users}, key=self._order.get))
        self._tails: dict[tuple[fx.Node, ...], tuple[fx.GraphModule, list[fx.Node]] | None] = {}
        for users in [*self._users, self._all_users]:
            if users not in self._tails:
                self._tails[users] = self._cut_tail(users)
        self._wanted = {node for tail in self._tails.values() if tail for node in tail[1]}
        changing = _closure(self._all_users, lambda node: node.users)
        self._near = changing | {a for node in changing for a in node.all_input_nodes}
        self._kept: dict[fx.Node, object] = {}
        self._keep_all = keep_all
        self._wide: fx.GraphModule | None = None
        self._state = {b.untyped_storage().data_ptr() for b in model.buffers()}

    def run(self, inputs: Tensor, observe=None) -> Tensor:
        """The base pass: the output, with all features kept that some tail reads.

        ``observe(node)`` is called after every operation.
        """
        self._kept.clear()
        return _Recorder(self, observe).run(inputs)

    def run_wide(self, inputs: Tensor) -> Tensor:
        """As :meth:`run`, in float64: output, kept features and the model's buffers are float64's, rounded to their own types.

        May raise whatever a user's operation raises that is not made for float64; buffers are then as before.
        """
        if self._wide is None:
            self._wide = copy.deepcopy(self.module).double()
        own = [*self.module.parameters(), *self.module.buffers()]
        for wide, narrow in zip([*self._wide.parameters(), *self._wide.buffers()], own, strict=True):
            wide.copy_(narrow)
        self._kept.clear()
        output = _WideRecorder(self, self._wide).run(inputs.double())
        for wide, narrow in zip(self._wide.buffers(), self.module.buffers(), strict=True):
            narrow.copy_(wide)
        return output.to(inputs.dtype)

    def keep(self, node: fx.Node, value: object) -> None:
        """Keep a value for the tails. A buffer is copied: each query finds the buffers as they were before the base pass.

        With ``keep_all`` features before the first trainable parameter are let go: only that they are tensors may be asked.
        """
        if self._keep_all and node not in self._near and isinstance(value, Tensor):
            self._kept[node] = value.new_empty(0)
        elif self._keep_all or node in self._wanted:
            is_buffer = isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._state
            self._kept[node] = value.clone() if is_buffer else value

    def tail(self, parameter: int | None) -> Tensor | None:
        """The output after a change of parameter number ``parameter``, of any if None; None where it does not depend on it."""
        tail = self._tails[self._all_users if parameter is None else self._users[parameter]]
        if tail is None:
            return None
        module, inputs = tail
        return module(*[self._kept[node] for node in inputs])

    def value(self, node: fx.Node) -> object:
        """The base value of an operation that some parameter may change, or that such a one reads (with ``keep_all``)."""
        return self._kept[node]

    def users(self, parameter: int) -> tuple[fx.Node, ...]:
        """The operations that read parameter number ``parameter``."""
        return self._users[parameter]

    def downstream(self, parameter: int) -> list[fx.Node]:
        """The operations between a parameter and the output, in order; empty where the output does not depend on it."""
        after = _closure(self._users[parameter], lambda node: node.users)
        output = next(reversed(self.module.graph.nodes))
        before = _closure([output], lambda node: node.all_input_nodes)
        return sorted(after & before, key=self._order.get) if output in after else []

    @property
    def kept_bytes(self) -> int:
        """Memory of the kept features; storage shared by several of them counts once."""
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._kept.values() if isinstance(t, Tensor)
        }
        return sum(storages.values())

    def _nodes_using(self, parameter: Tensor) -> tuple[fx.Node, ...]:
        def reads(node: fx.Node) -> bool:
            if node.op == "call_module":
                return any(p is parameter for p in self.module.get_submodule(node.target).parameters())
            return node.op == "get_attr" and operator.attrgetter(node.target)(self.module) is parameter

        return tuple(node for node in self._order if reads(node))

    def _cut_tail(self, users: tuple[fx.Node, ...]) -> tuple[fx.GraphModule, list[fx.Node]] | None:
        """The operations downstream of ``users`` as a module of its own, and the base values that it takes."""
        downstream = _closure(users, lambda node: node.users)
        ordered = sorted(downstream, key=self._order.get)
        if not ordered or ordered[-1].op != "output":
            return None
        inputs = sorted({n for node in ordered for n in node.all_input_nodes if n not in downstream}, key=self._order.get)
        tail = fx.Graph()
        copies = {node: tail.placeholder(f"kept_{k}") for k, node in enumerate(inputs)}
        for node in ordered:
            copies[node] = tail.node_copy(node, copies.__getitem__)
        return fx.GraphModule(self.module, tail), inputs


def _closure(start, neighbours) -> set[fx.Node]:
    """All nodes reached from ``start``, those included."""
    found, stack = set(start), list(start)
    while stack:
        fresh = [node for node in neighbours(stack.pop()) if node not in found]
        found.update(fresh)
        stack += fresh
    return found


class _Tracer(fx.Tracer):
    """Buffers are part of the graph: what the forward pass writes to them must happen in each run, not while tracing."""

    proxy_buffer_attributes = True

    def __init__(self, whole):
        super().__init__()
        self._whole = whole

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return type(m) in self._whole or super().is_leaf_module(m, module_qualified_name)


def _trace(model: torch.nn.Module, name: str, engine: str, whole) -> fx.Graph:
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        graph = _Tracer(whole).trace(model)
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        text = f"{' '.join(str(error).split())}{_place(error)}"
        raise InputError(f'engine "{engine}": torch.fx cannot trace {name} ({text}); use engine = "full"') from None
    finally:
        assigned = [key for module, own in buffers for key, b in own.items() if module._buffers.get(key) is not b]
        for module, own in buffers:
            module._buffers.update(own)
    if assigned:
        raise InputError(
            f'{name} assigns its buffer {assigned[0]} in forward, which engine "{engine}" cannot repeat; use engine = "full"'
        )
    return graph


def _place(error: Exception) -> str:
    """The line of the user's code that raised an error, if it was the user's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}torch{os.sep}" not in f.filename]
    at = frames[-1] if frames else None
    return f": {at.line!r}, {os.path.basename(at.filename)} line {at.lineno}" if at and at.filename != __file__ else ""


class _Recorder(fx.Interpreter):
    """Runs the graph and keeps the wanted values."""

    def __init__(self, network: Network, observe):
        super().__init__(network.module)
        self._network, self._observe = network, observe

    def run_node(self, node: fx.Node):
        value = super().run_node(node)
        self._network.keep(node, value)
        if self._observe:
            self._observe(node)
        return value


class _WideRecorder(fx.Interpreter):
    """Runs a copy of the graph in float64 and keeps what a run of the graph itself would keep."""

    def __init__(self, network: Network, wide: fx.GraphModule):
        super().__init__(wide)
        self._network = network
        self._own = dict(zip(wide.graph.nodes, network.module.graph.nodes, strict=True))

    def run_node(self, node: fx.Node):
        value = super().run_node(node)
        self._network.keep(self._own[node], fx.node.map_aggregate(value, _narrowed))
        return value


def _narrowed(value):
    """A copy in float32 of a float64 tensor; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value


def _remove_in_place(module: fx.GraphModule, name: str, engine: str) -> None:
    """Replace in-place operations; raise InputError for those that have no out-of-place form."""
    graph = module.graph
    for node in list(graph.nodes):
        if not _make_out_of_place(module, node, name, engine):
            continue
        overwritten, seen = node.args[0], False
        for later in graph.nodes:
            if seen:
                later.replace_input_with(overwritten, node)
            seen = seen or later is node
    graph.lint()
    module.recompile()


def _take_by_position(module: fx.GraphModule) -> None:
    """Tensors that a function written in Python takes by keyword become positional: readers find them at one place."""
    for node in module.graph.nodes:
        if node.op != "call_function" or all(a in _nodes_in(node.args) for a in node.all_input_nodes):
            continue
        try:
            bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        except (TypeError, ValueError):  # functions written in C++ have no signature
            continue
        bound.apply_defaults()
        node.args, node.kwargs = bound.args, bound.kwargs
    module.recompile()


def _nodes_in(arguments: object) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return found


def _is_state(node: object) -> bool:
    """Whether a node is a buffer, or what an in-place method left of it."""
    if not isinstance(node, fx.Node):
        return False
    return node.op == "get_attr" or (node.op == "call_method" and node.target.endswith("_") and _is_state(node.args[0]))


def _make_out_of_place(module: fx.GraphModule, node: fx.Node, name: str, engine: str) -> bool:
    """Rewrite one node; True if it was in-place. A buffer may be overwritten: that is the network's own bookkeeping."""
    if node.args and _is_state(node.args[0]):
        return False
    if node.op == "call_module":
        leaf = module.get_submodule(node.target)
        if not getattr(leaf, "inplace", False):
            return False
        leaf = copy.copy(leaf)  # shares parameters and buffers with the user's module, which stays as it is
        leaf.inplace = False
        module.set_submodule(node.target, leaf)
        return True
    if node.op == "call_function" and node.target in OUT_OF_PLACE:
        node.target = OUT_OF_PLACE[node.target]
        return True
    if node.op == "call_function" and node.kwargs.get("inplace"):
        node.update_kwarg("inplace", False)
        return True
    if node.op not in ("call_method", "call_function"):
        return False
    method = node.op == "call_method"
    target = node.target if method else getattr(node.target, "__name__", "")
    if target != "setitem" and "out" not in node.kwargs and (not target.endswith("_") or target.endswith("__")):
        return False
    homes = [Tensor] if method else [torch, torch.nn.functional]
    plain = next((getattr(home, target[:-1]) for home in homes if callable(getattr(home, target[:-1], None))), None)
    if plain is None or "out" in node.kwargs:
        raise InputError(
            f'{name} overwrites a tensor by {target} (node {node.name}), which engine "{engine}" cannot undo; use engine = "full"'
        )
    node.target = target[:-1] if method else plain
    return True
