"""Runs that a kernel of our own carries changes through, on a GPU: BatchNorm [- sum with others] [- ReLU] of images."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from dzhpc.engines.delta.change import Change, Origin
from dzhpc.engines.delta.differences import coefficients_of_means
from dzhpc.engines.delta.layout import Layout
from dzhpc.engines.delta.operations import Operations
from dzhpc.engines.delta.rules import elementwise, products
from dzhpc.engines.kernels.find import Pass


@dataclass(frozen=True)
class Form:
    """What such a run consists of."""

    norm: fx.Node
    add: fx.Node | None = None
    relu: fx.Node | None = None


class Passes:
    """Carries the changes of one engine through such runs."""

    def __init__(self, operations: Operations):
        self._operations = operations
        self._forms: dict[tuple[fx.Node, ...], Form | None] = {}

    def advance(self, nodes: tuple[fx.Node, ...], changes: dict[fx.Node, Change | Origin | list[Change]]) -> bool:
        """Add to ``changes`` the one that leaves the run, if a kernel knows its operations and these changes; whether it does."""
        if nodes not in self._forms:
            self._forms[nodes] = self._form(nodes)
        form, operations = self._forms[nodes], self._operations
        if form is None or not operations.kernels.compiling:
            return False
        change, others = changes.get(form.norm.args[0]), []
        if form.add is not None:
            others = [changes[a] for a in form.add.args if a is not form.norm and a in changes]
        dense = all(isinstance(c, Change) and c.channel is None and c.data.dtype == operations.travel for c in (change, *others))
        kernel = operations.kernels.find("pass", operations.module(form.norm), change.data) if dense else None
        if kernel is None:
            return False
        changes[nodes[-1]] = self._carry(form, kernel, change, others[0].data if others else None)
        return True

    def _form(self, nodes: tuple[fx.Node, ...]) -> Form | None:
        """What a run is, if it is one of these."""
        operations = self._operations
        alone = all(set(node.users) == {after} for node, after in itertools.pairwise(nodes))
        value = operations.network.value(nodes[0])
        if not (alone and isinstance(operations.module(nodes[0]), nn.BatchNorm2d) and operations.normalises(nodes[0])):
            return None
        if not (isinstance(value, Tensor) and value.ndim == 4 and value.dtype == torch.float32):
            return None
        order = [operations.rule(node).function for node in nodes[1:]]
        rest = dict(zip(order, nodes[1:], strict=True))
        add, relu = rest.get(products.add), rest.get(elementwise.relu)
        known = order == [f for f in (products.add, elementwise.relu) if f in rest]
        return Form(nodes[0], add, relu) if known and (add is None or self._adds_alike(add)) else None

    def _adds_alike(self, node: fx.Node) -> bool:
        """Whether an operation adds up two values of one shape."""
        values = [self._operations.network.value(a) for a in node.args if isinstance(a, fx.Node)]
        shapes = {v.shape for v in values if isinstance(v, Tensor)}
        return len(node.args) == len(values) == len(set(node.args)) == 2 and len(shapes) == 1 and not node.kwargs

    def _carry(self, form: Form, kernel: Pass, change: Change, residual: Tensor | None) -> Change:
        operations, module = self._operations, self._operations.module(form.norm)
        data, centred = rows(change.data), self._beside(form.norm, "centred")
        means = kernel.sums(data, centred) if change.means is None else change.means
        mean_d, scale, shrink = coefficients_of_means(*means, operations.scale(form.norm).flatten())
        gamma = 1 if module.weight is None else module.weight
        value = None if form.relu is None else self._beside(form.relu.args[0], "value")
        beside = None if residual is None else rows(residual)
        out = kernel.carry(data, centred, torch.stack([mean_d, scale * gamma, shrink * gamma], 1), beside, value)
        coords, batch, channels, height, width = change.data.shape
        return Change(out.view(coords, batch, height, width, channels).permute(0, 1, 4, 2, 3))

    def _beside(self, node: fx.Node, what: str) -> Tensor:
        """Base values as rows, in the type that changes travel in; once a batch."""
        operations = self._operations
        layout = Layout(apart=False, rounded=operations.travel != operations.dtype)
        return operations.at_hand(node).cached(("rows", what), lambda: rows(getattr(operations, what)(node, layout)))


def rows(images: Tensor) -> Tensor:
    """Images [..., B, C, H, W] as rows of channels [..., B H W, C]; nothing is copied where the channels lie innermost."""
    return images.movedim(-3, -1).flatten(-4, -2).contiguous()
