"""The operations of a traced network as their rules see them."""

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from dzhpc.engines.delta.change import Change, Operation
from dzhpc.engines.delta.layout import Layout
from dzhpc.engines.delta.rules import table
from dzhpc.engines.delta.rules.rule import Rule
from dzhpc.engines.kernels.find import Kernels
from dzhpc.engines.kernels.library import BATCH
from dzhpc.engines.traced import Traced

#: operation -> the change of its output, for a chunk of P coordinates; a list where the output is one
Changes = dict[fx.Node, Change | list[Change]]


class Operations:
    """Nodes with their rules, the base values of the batch that the network ran last, and what was derived from these.

    dtype: of the parameters. travel: the type that changes of whole values travel in; those of single channels do in ``dtype``.
    """

    def __init__(self, network: Traced, dtype: torch.dtype, travel: torch.dtype, kernels: Kernels):
        self.network, self.dtype, self.travel, self.kernels = network, dtype, travel, kernels
        self._caches: dict[fx.Node, dict] = {}
        self._modules: dict[fx.Node, nn.Module] = {}

    def new_batch(self) -> None:
        """Forget what was derived from the last batch's base values."""
        self._caches.clear()

    @property
    def storages(self) -> dict[int, int]:
        """Address -> bytes of what was derived from the batch's base values."""
        found = [t for cache in self._caches.values() for v in cache.values() for t in (v if isinstance(v, tuple) else (v,))]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}

    def module(self, node: fx.Node) -> nn.Module | None:
        """The layer that an operation is, if it is one."""
        if node.op == "call_module" and node not in self._modules:
            self._modules[node] = self.network.module.get_submodule(node.target)
        return self._modules.get(node)

    def rule(self, node: fx.Node, incoming: list | None = None) -> Rule:
        """The rule of an operation; table.FALLBACK too where more of its inputs change than the rule knows of."""
        rule = table.find(node, self.module(node))
        several = incoming is not None and any(c is not None for c in incoming[1:])
        return table.FALLBACK if several and not rule.several else rule

    def incoming(self, node: fx.Node, changes: Changes) -> list:
        """The changes of an operation's arguments, parallel to them."""
        return [_change_of(a, changes) for a in node.args]

    def at_hand(self, node: fx.Node, incoming: list | None = None, kernels: bool = False) -> Operation:
        """A node with the batch's base values (incoming None: nothing changes).

        kernels: whether compiled ones may serve, where they are worth it.
        """
        incoming = [None] * len(node.args) if incoming is None else incoming
        value = self.network.value(node)
        worth_it = kernels and isinstance(value, Tensor)
        worth_it = worth_it and (self.kernels.programs.is_worth_it(value.numel()) or self.has_library(value))
        operation = self._operation(node, incoming, self.network.value, self._caches.setdefault(node, {}))
        operation.kernels = self.kernels if worth_it else None
        return operation

    def in_trace(self, node: fx.Node, incoming: list, known: dict[fx.Node, Tensor], cache: dict) -> Operation:
        """A node with those base values that are ``known`` to a trace, and others as they are."""
        return self._operation(node, incoming, lambda a: known[a] if a in known else self.network.value(a), cache)

    def _operation(self, node: fx.Node, incoming: list, value: Callable[[fx.Node], object], cache: dict) -> Operation:
        module = self.module(node)

        def run(args: tuple, kwargs: dict):
            self.network.moved.put_back(node)
            if node.op == "call_method":
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            return (module or node.target)(*args, **kwargs)

        args, kwargs = (fx.map_arg(a, value) for a in (node.args, node.kwargs))
        return Operation(run, args, kwargs, incoming, value(node), module, cache)

    def has_library(self, value: object) -> bool:
        """Whether our own library serves changes of this base value: those of a batch that fills vectors."""
        full = isinstance(value, Tensor) and value.ndim in (2, 4) and value.shape[0] >= BATCH
        return full and value.dtype == torch.float32 and self.kernels.library is not None

    def travelling(self, change: Change) -> Change:
        """In the type that a change of its kind travels in."""
        return change.to(self.travel, self.dtype)

    def normalises(self, node: fx.Node) -> bool:
        """Whether an operation takes statistics of its input."""
        rule = self.rule(node)
        return rule.statistics is not None and rule.normalises(self.module(node))

    def centres(self, node: fx.Node) -> bool:
        """Whether it subtracts the mean of each channel over the batch: a BatchNorm that normalises by the batch at hand."""
        return self.rule(node).sums is not None and self.normalises(node)

    def value(self, node: fx.Node, layout: Layout) -> Tensor:
        """A base value as it lies beside changes."""
        return self.laid_out(node, "value", layout, lambda: self.network.value(node))

    def centred(self, node: fx.Node, layout: Layout) -> Tensor:
        """A normalisation's input less its mean, as it lies beside changes."""
        return self.laid_out(node, "centred", layout, lambda: self._statistics(node)[0])

    def scale(self, node: fx.Node) -> Tensor:
        """What a normalisation divides by."""
        return self._statistics(node)[1]

    def tables(self, node: fx.Node) -> tuple[Tensor, ...]:
        """What an operation's rule computes of its base input."""
        rule = self.rule(node)
        return () if rule.tables is None else self.once(node, "tables", lambda: rule.tables(self.at_hand(node)))

    def table(self, node: fx.Node, number: int, layout: Layout) -> Tensor:
        """One of them, as it lies beside changes."""
        return self.laid_out(node, ("table", number), layout, lambda: self.tables(node)[number])

    def _statistics(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        return self.rule(node).statistics(self.at_hand(node))

    def laid_out(self, node: fx.Node, name: str, layout: Layout, make: Callable[[], Tensor]) -> Tensor:
        """What ``make()`` gives, as it lies beside changes; once a batch."""
        return self.once(node, (name, layout), lambda: layout.of(make(), self.dtype, self.travel))

    def once(self, node: fx.Node, name: object, make: Callable):
        """``make()``, a tensor or a tuple of tensors, once a batch."""
        cache = self._caches.setdefault(node, {})
        if name not in cache:
            cache[name] = make()
        return cache[name]


def _change_of(a, changes: Changes):
    """The change of an argument, which may be a list. No closure: one that calls itself would keep all changes until gc runs."""
    if isinstance(a, (list, tuple)):
        return [_change_of(x, changes) for x in a] if any(isinstance(x, fx.Node) and x in changes for x in a) else None
    return changes.get(a) if isinstance(a, fx.Node) else None
