"""The traced network (torch.fx): its operations, what lies downstream of each parameter, the values of a base pass.

Tracing keeps PyTorch's own modules whole and looks into everybody else's. No operation of a traced network overwrites the value
of another (:mod:`dzhpc.engines.outofplace`).
"""

import copy
import operator
from collections.abc import Callable, Container, Iterator, Set
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from dzhpc.engines.losses import Loss
from dzhpc.engines.moved import Moved, address_of, closure, differ, name_of, scale_of
from dzhpc.engines.outofplace import remove_in_place, take_by_position
from dzhpc.engines.pinned import OWN_STATE, Moment, Pinned
from dzhpc.engines.tracing import trace
from dzhpc.errors import InputError, is_out_of_memory


class Traced:
    """A module as a graph of operations, and the values of its last base pass.

    engine: who asks, for the errors. whole: layers of users that are kept whole, too. Raises InputError if torch.fx cannot trace
    the module, or if it overwrites a value in a way that cannot be undone. moved: its buffers that move, once :meth:`watch` has
    seen a pass.
    """

    def __init__(self, model: nn.Module, parameters: list[Tensor], engine: str = "reuse", whole: Container[type] = ()):
        name = type(model).__name__
        self.module = trace(model, name, engine, whole)
        remove_in_place(self.module, name, engine)
        take_by_position(self.module)
        self.order = {node: k for k, node in enumerate(self.module.graph.nodes)}
        self._users = [self._nodes_using(p) for p in parameters]
        self._all_users = tuple(sorted({node for users in self._users for node in users}, key=self.order.get))
        changing = closure(self._all_users, lambda node: node.users)
        self._near = changing | {a for node in changing for a in node.all_input_nodes}
        self._state = {address_of(b) for b in model.buffers()} - {0}
        self.moved = Moved(self.module)
        self._wide: fx.GraphModule | None = None
        self._kept: dict[fx.Node, object] = {}
        self._fresh: set[fx.Node] = set()  # whose values others may write to

    def run(self, inputs: Tensor, wanted: Set[fx.Node] | None = None) -> Tensor:
        """The base pass: the output; the values of the ``wanted`` operations are kept.

        wanted None: all values are kept; but of a tensor that no parameter changes, and that is not read beside one that changes,
        only that it is a tensor.
        """
        self._kept.clear()
        return _Recorder(self.module, self._note(self.module), lambda node, value: self._keep(node, value, wanted)).run(inputs)

    def watch(self, inputs: Tensor, wanted: Set[fx.Node] | None, observe: Callable[[fx.Node], None]) -> Tensor:
        """As :meth:`run`, while it is seen which buffers move; ``observe(node)`` is called after every operation."""

        def after(node: fx.Node, value: object) -> None:
            self.moved.watched(node)
            self._keep(node, value, wanted)
            observe(node)

        self._kept.clear()
        return _Recorder(self.module, self.moved.watch, after).run(inputs)

    def run_wide(self, inputs: Tensor) -> Tensor:
        """As :meth:`run`, in float64: output, kept values and the model's buffers are float64's, rounded to their own types.

        May raise whatever a user's operation raises that is not made for float64; buffers are then as before.
        """
        if self._wide is None:
            self._wide = copy.deepcopy(self.module).double()
        own = [*self.module.parameters(), *self.module.buffers()]
        for wide, narrow in zip([*self._wide.parameters(), *self._wide.buffers()], own, strict=True):
            wide.copy_(narrow)
        self._kept.clear()
        here = dict(zip(self._wide.graph.nodes, self.module.graph.nodes, strict=True))
        keep = lambda node, value: self._keep(here[node], fx.node.map_aggregate(value, _narrowed), None)  # noqa: E731
        note = lambda node, values: self._note(self._wide)(here[node], values)  # noqa: E731
        output = _Recorder(self._wide, note, keep).run(inputs.double() if inputs.is_floating_point() else inputs)
        for wide, narrow in zip(self._wide.buffers(), self.module.buffers(), strict=True):
            narrow.copy_(wide)
        return _narrowed(output)

    def value(self, node: fx.Node) -> object:
        """What an operation gave in the base pass, if it was kept; a copy of a buffer that operations write to."""
        value = self._kept[node]
        return value.clone() if node in self._fresh else value

    def users(self, parameter: int | None) -> tuple[fx.Node, ...]:
        """The operations that read parameter number ``parameter``, or any parameter, in order."""
        return self._all_users if parameter is None else self._users[parameter]

    def downstream(self, parameter: int) -> list[fx.Node]:
        """The operations between a parameter and the output, in order; empty where the output does not depend on it."""
        after = closure(self._users[parameter], lambda node: node.users)
        output = self.module.graph.output_node()
        before = closure([output], lambda node: node.all_input_nodes)
        return sorted(after & before, key=self.order.get) if output in after else []

    @property
    def storages(self) -> dict[int, int]:
        """{address: bytes} of the memory of all kept values; what several of them share occurs once."""
        tensors = [t for t in self._kept.values() if isinstance(t, Tensor)]
        return {address_of(t): t.untyped_storage().nbytes() for t in tensors if address_of(t)}

    @property
    def kept_bytes(self) -> int:
        """Memory of the kept values."""
        return sum(self.storages.values())

    def _note(self, module: fx.GraphModule) -> Callable:
        return lambda node, values: self.moved.note(node, module) if self.moved.writes(node) else None

    def _keep(self, node: fx.Node, value: object, wanted: Set[fx.Node] | None) -> None:
        """A buffer is copied: each query finds the buffers as they were before the base pass."""
        if wanted is None and node not in self._near and isinstance(value, Tensor):
            self._kept[node] = value.new_empty(0)
        elif wanted is None or node in wanted:
            is_buffer = isinstance(value, Tensor) and address_of(value) in self._state
            self._kept[node] = value.clone() if is_buffer else value
            if is_buffer and self.moved.moves(value):
                self._fresh.add(node)

    def _nodes_using(self, parameter: Tensor) -> tuple[fx.Node, ...]:
        def reads(node: fx.Node) -> bool:
            if node.op == "call_module":
                return any(p is parameter for p in self.module.get_submodule(node.target).parameters())
            return node.op == "get_attr" and operator.attrgetter(node.target)(self.module) is parameter

        return tuple(node for node in self.order if reads(node))


class Traces:
    """The trace of a model in the mode and for the number of axes at hand: made, and compared with the model, when they change.

    So it is where a number, a text or a tensor is another one that somebody gave a module as an attribute: a trace holds these.

    Raises InputError for a model that is no torch.nn.Module, that torch.fx cannot trace, that draws random numbers in its forward
    pass, or whose trace does not reproduce it.
    """

    def __init__(
        self, model: nn.Module, parameters: list[Tensor], loss: Loss, pinned: Pinned, engine: str, whole: Container[type] = ()
    ):
        self._model, self._parameters, self._loss, self._pinned, self._engine = model, parameters, loss, pinned, engine
        self._whole = whole
        self._made_for: object = None  # modes of the modules, axes of the inputs
        self._held: list[object] = []  # attributes of the modules
        self._traced: Traced | None = None

    def current(self, inputs: Tensor, targets: Tensor, start: Moment, wanted: Set[fx.Node] | None) -> Traced:
        """The trace for a batch. A new one was run once and holds the ``wanted`` values; buffers are as at ``start`` again."""
        made_for = (self._modes(), inputs.ndim)  # train and eval trace differently
        if made_for != self._made_for or not _equal(self._attributes(), self._held):
            try:
                traced = Traced(self._model, self._parameters, self._engine, self._whole)
                self._compare(traced, inputs, targets, start, wanted)
            finally:
                self._pinned.rewind(start)
            self._traced, self._made_for = traced, made_for
            self._held = self._attributes()  # as passes leave them: what counts its passes is not traced again
        return self._traced

    @contextmanager
    def as_traced(self) -> Iterator[None]:
        """Within, the model is in the mode that it was traced in."""
        now, (modes, _) = self._modes(), self._made_for
        self._switch(modes)
        try:
            yield
        finally:
            self._switch(now)

    def _attributes(self) -> list[object]:
        tables = (table for m in self._model.modules() for table in (vars(m), m._buffers))
        return [value for table in tables for value in table.values() if isinstance(value, (int, float, str, Tensor))]

    def _modes(self) -> list[bool]:
        return [m.training for m in self._model.modules()]

    def _switch(self, modes: list[bool]) -> None:
        for module, training in zip(self._model.modules(), modes, strict=True):
            module.training = training

    def _compare(self, traced: Traced, inputs: Tensor, targets: Tensor, start: Moment, wanted: Set[fx.Node] | None) -> None:
        """Compare trace and model once: the safety net under aliasing and control flow that a trace cannot see."""
        name, random = type(self._model).__name__, []

        def note_random(node: fx.Node) -> None:
            if not random and (generator := self._pinned.drawn(start)):
                random.append(f"in {name_of(node)} (dropout?)" if generator.startswith("torch") else f"from {generator}")

        if (generator := self._pinned.drawn(start)) and not generator.startswith("torch"):
            random.append(f"from {generator}")  # the trace itself has drawn, and would repeat its numbers for ever
        outputs = None if random else self._watched(traced, inputs, start, wanted, note_random)
        if random:
            raise InputError(
                f"{name} draws random numbers {random[0]}, which a partial pass "
                f'(engine "{self._engine}") cannot repeat; use engine = "full"'
            )
        if conflict := traced.moved.conflict():
            raise InputError(f'{name} {conflict}, which engine "{self._engine}" cannot repeat; use engine = "full"')
        moved = [b.clone() for b in self._model.buffers()]
        self._pinned.rewind(start)
        first = self._model(inputs.clone())
        self._pinned.rewind(start)
        expected = self._model(inputs)
        if isinstance(first, Tensor) and not torch.allclose(
            first, expected, rtol=1e-4, atol=1e-4 * scale_of(first), equal_nan=True
        ):
            raise InputError(f"{name} gives something else each time it is asked: {OWN_STATE}")
        a, b = self._loss(outputs, targets), self._loss(expected, targets)
        if not torch.allclose(a, b, rtol=1e-5, equal_nan=True):
            raise InputError(f'engine "{self._engine}": the trace of {name} does not reproduce it; use engine = "full"')
        for (key, buffer), value in zip(self._model.named_buffers(), moved, strict=True):
            if differ(buffer, value):
                raise InputError(f'engine "{self._engine}": the trace of {name} leaves another {key}; use engine = "full"')
        self._compare_elsewhere(traced, inputs, start)

    def _watched(self, traced: Traced, inputs: Tensor, start: Moment, *how: object) -> Tensor:
        """The first pass of a trace, which may fail where the model does not: ``with torch.enable_grad()`` leaves no trace."""
        try:
            return traced.watch(inputs, *how)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._pinned.rewind(start)
            self._model(inputs)  # a fault of its own is raised as it is
            text = " ".join(str(error).partition("While executing")[0].split())
            raise InputError(
                f'engine "{self._engine}": the trace of {type(self._model).__name__} does not run ({text}); use engine = "full"'
            ) from None

    def _compare_elsewhere(self, traced: Traced, inputs: Tensor, start: Moment) -> None:
        """The same for other inputs: a trace may hold values of the batch that the network saw last, kept by a hook, say."""
        other = inputs.clone()
        other.copy_(inputs.roll(1, 0) if len(inputs) > 1 else inputs / 2)
        outputs = []
        for run in (self._model, traced.module):
            self._pinned.rewind(start)
            outputs.append([t for t in tree_leaves(run(other.clone())) if isinstance(t, Tensor)])
        for expected, found in zip(*outputs, strict=False):
            close = partial(torch.allclose, rtol=1e-4, atol=1e-4 * scale_of(expected), equal_nan=True)
            if expected.shape != found.shape or not close(found, expected):
                raise InputError(
                    f"{type(self._model).__name__} reads what an earlier pass has left (kept by a hook?), which engine "
                    f'"{self._engine}" cannot repeat; use engine = "full"'
                )


def _equal(some: list[object], others: list[object]) -> bool:
    """Whether attributes are the same: tensors by identity, since a trace sees what is written into them."""
    same = (
        a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b) for a, b in zip(some, others, strict=False)
    )
    return len(some) == len(others) and all(same)


def need_module(model: object, engine: str) -> None:
    """Raise InputError for what torch.fx cannot trace in any case."""
    if not isinstance(model, nn.Module):
        raise InputError(f'engine "{engine}" needs a torch.nn.Module; use engine = "full" for other callables')


class _Recorder(fx.Interpreter):
    """Runs a graph; ``before(node, values of its inputs)`` and ``after(node, its value)`` are called for every operation."""

    def __init__(self, module: fx.GraphModule, before: Callable, after: Callable):
        super().__init__(module)
        self._before, self._after = before, after

    def run_node(self, node: fx.Node):
        self._before(node, [self.env[a] for a in node.all_input_nodes])
        value = super().run_node(node)
        self._after(node, value)
        return value


def _narrowed(value):
    """A copy in float32 of a float64 tensor; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value
