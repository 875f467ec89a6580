"""Runs that our own library carries a chunk through: [BatchNorm] [+ residual] [ReLU] [max pool] [mean over pixels] of images.

Everything else is left to :class:`dzhpc.engines.delta.fused.Fused`. A convolution before such a run is part of it:
what it makes of one channel never lies in memory, what it makes of all of them stays in a cache.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from dzhpc.engines.delta.change import Change, Origin
from dzhpc.engines.delta.layout import Layout
from dzhpc.engines.delta.operations import Operations
from dzhpc.engines.delta.rules import elementwise, pooling, products, structure
from dzhpc.engines.delta.rules.convolution import by_product
from dzhpc.engines.kernels.convolutions import Own
from dzhpc.engines.kernels.library import BATCH, DEEPEST, Layer, Library, Norm, Planes
from dzhpc.engines.windows import borders, padded, window_of


@dataclass(frozen=True)
class Block:
    """What a run consists of."""

    first: fx.Node
    norm: fx.Node | None = None
    add: fx.Node | None = None
    relu: fx.Node | None = None
    pool: fx.Node | None = None
    size: int = 1  # of the pool's window
    mean: bool = False

    @property
    def bent(self) -> fx.Node | None:
        """The operation whose input decides what passes."""
        return self.relu or self.pool


class Blocks:
    """Carries changes through runs that are blocks."""

    def __init__(self, operations: Operations):
        self._operations = operations
        self._known: dict[tuple[fx.Node, ...], Block | None] = {}

    def block(self, nodes: tuple[fx.Node, ...]) -> Block | None:
        """What a run is to the library, if anything."""
        if nodes not in self._known:
            self._known[nodes] = self._look_at(nodes)
        return self._known[nodes]

    def advance(self, nodes: tuple[fx.Node, ...], changes: dict[fx.Node, Change | Origin | list[Change]]) -> bool:
        """Add to ``changes`` what leaves the run, if it is a block that these changes pass; whether it is."""
        block, library = self.block(nodes), self._operations.kernels.library
        if block is None:
            return False
        moving = [a for a in block.first.args if isinstance(a, fx.Node) and a in changes]
        value = self._operations.network.value(moving[0])  # what goes in: a pool makes less of it
        if not (isinstance(value, Tensor) and value.ndim == 4 and self._operations.has_library(value)):
            return False
        beside = [a for a in (block.add.args if block.add else ()) if isinstance(a, fx.Node) and a in changes and a not in nodes]
        if block.first is block.add:
            beside = beside[1:]
            moving = moving[:1]
        source = self._source(changes[moving[0]]) if len(moving) == 1 else None
        residual = changes[beside[0]] if len(beside) == 1 else None
        if source is None or len(beside) > 1 or not self._fits(source, residual):
            for a in moving:
                if isinstance(changes[a], Origin) and isinstance(changes[a].source, Layer):
                    changes[a] = changes[a].now()
            return False
        changes[nodes[-1]] = self._carry(library, block, nodes, value.shape, changes[moving[0]], source, residual)
        return True

    def convolved(self, node: fx.Node, change: Change | Origin | list[Change] | None) -> Origin | None:
        """What a convolution makes of a change, left to the block behind it; None where it cannot be."""
        conv, user, operations = self._operations.module(node), next(iter(node.users), None), self._operations
        behind = [block for nodes, block in self._known.items() if user is nodes[0]]
        alone = len(node.users) == 1 and behind and all(block is not None and block.first is not block.add for block in behind)
        served = alone and isinstance(conv, nn.Conv2d) and isinstance(change, Change) and change.axis == 1
        if not served or not operations.has_library(operations.network.value(node)):
            return None
        return self._dense(node, conv, change) if change.channel is None else self._one_channel(conv, change)

    def _dense(self, node: fx.Node, conv: nn.Conv2d, change: Change) -> Origin | None:
        kernel = self._operations.kernels.find("conv2d", conv, change.data)
        if not isinstance(kernel, Own):
            return None
        make = lambda: kernel.weights(conv, change.data.dtype)  # noqa: E731
        weights = self._operations.once(node, (kernel.name, change.data.dtype), make)
        layer = Layer(change.data, weights, conv.out_channels, window_of(conv), borders(conv), kernel.name)
        return Origin(lambda data: kernel.convolve(conv, data, weights, None)[0], [change.data], None, name="layer", source=layer)

    def _one_channel(self, conv: nn.Conv2d, change: Change) -> Origin | None:
        plain = conv.groups == 1 and conv.padding_mode == "zeros" and min(borders(conv)) >= 0
        if change.data.ndim != 4 or not plain or change.data.shape[1] < BATCH:
            return None
        columns = conv.weight.flatten(2)[:, change.channel].permute(1, 2, 0)  # [P, kh kw, O]
        planes = Planes.of(change.data, change.channel)
        planes.channel, planes.columns, planes.window, planes.border = None, columns, window_of(conv), borders(conv)
        window, border = planes.window, planes.border

        def make(data: Tensor, columns: Tensor) -> Tensor:
            return by_product(padded(data, border, "zeros"), columns, window)

        return Origin(make, [change.data, columns.contiguous()], None, name="convolved", source=planes)

    def _look_at(self, nodes: tuple[fx.Node, ...]) -> Block | None:
        operations, found = self._operations, {"first": nodes[0]}
        inside = all(set(node.users) == {after} for node, after in itertools.pairwise(nodes))
        images = all(isinstance(v := operations.network.value(a), Tensor) and v.dtype == torch.float32 for a in nodes)
        if not (inside and images and operations.network.value(nodes[0]).ndim == 4):
            return None
        order = ["norm", "add", "relu", "pool", "mean"]
        for node in nodes:
            rule, module, name = operations.rule(node), operations.module(node), None
            if isinstance(module, nn.BatchNorm2d) and operations.normalises(node):
                name = "norm"
            elif rule.function is products.add and self._adds_alike(node):
                name = "add"
            elif rule.function is elementwise.relu:
                name = "relu"
            elif rule.function is pooling.max_pool and (size := pooling.plain_size(operations.at_hand(node))) and size <= DEEPEST:
                name, found["size"] = "pool", size
            elif (rule.function is structure.mean and _over_pixels(node)) or _is_global(module):
                name = "mean"
            if name not in order:
                return None
            order = order[order.index(name) + 1 :]
            found[name] = True if name == "mean" else node
        return Block(**found)

    def _adds_alike(self, node: fx.Node) -> bool:
        """Whether two values of one shape are added up."""
        shapes = [
            getattr(self._operations.network.value(a), "shape", None) for a in (*node.args[:2], node) if isinstance(a, fx.Node)
        ]
        return len(shapes) == 3 and shapes[0] == shapes[1] == shapes[2] and not node.kwargs and len(node.args) == 2

    def _source(self, change: Change | Origin | list[Change]) -> Tensor | Planes | Layer | None:
        """The change as the library reads it."""
        if isinstance(change, Origin):
            return change.source
        if isinstance(change, list) or change.data.ndim != (5 if change.channel is None else 4) or change.axis != 1:
            return None
        if change.channel is None:
            return change.data if change.data.dtype == self._operations.travel else None
        return Planes.of(change.data, change.channel)

    def _fits(self, source: Tensor | Planes | Layer, residual: Change | Origin | list[Change] | None) -> bool:
        """Whether the library knows a sum of these: dense with anything made, one channel with nothing."""
        if residual is None:
            return True
        single = isinstance(source, Planes) and source.columns is None
        if single or not isinstance(residual, Change) or residual.axis != 1:
            return False
        if residual.channel is None:
            return residual.data.ndim == 5 and residual.data.dtype == self._operations.travel
        return residual.data.ndim == 4

    def _carry(
        self, library: Library, block: Block, nodes: tuple[fx.Node, ...], shape: torch.Size, change: Change | Origin,
        source: Tensor | Planes | Layer, residual: Change | None,
    ) -> Change:  # fmt: skip
        operations = self._operations
        single = isinstance(source, Planes) and source.columns is None
        layout = Layout(apart=True, rounded=not single and operations.travel != operations.dtype)
        norm = value = left_over = beside = None
        if block.norm:
            means = getattr(change, "means", None)
            means = None if means is None else means.permute(1, 2, 0).double().contiguous()
            scale, gamma = operations.once(block.norm, "flat", lambda: self._affine(block.norm))
            norm = Norm(operations.centred(block.norm, layout), scale, gamma, means)
        if block.bent:
            before = block.bent.args[0]
            if block.pool:
                value = operations.laid_out(block.pool, "below", layout, lambda: self._below(before, block))
                left_over = operations.value(block.pool, layout) if block.relu else None
            else:
                value = operations.value(before, layout)
        if residual is not None:
            beside = residual.data if residual.channel is None else (residual.data, residual.channel)
        data = library.carry(
            source, shape, operations.travel, norm, beside, block.relu is not None, block.size, block.mean, value, left_over
        )
        data = data.reshape(*data.shape, *[1] * (operations.network.value(nodes[-1]).ndim - data.ndim + (0 if single else 1)))
        return Change(data, source.channel if single else None)

    def _affine(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        """(s, the layer's factor), each [C]."""
        s, weight = self._operations.scale(node).flatten().contiguous(), self._operations.module(node).weight
        return s, torch.ones_like(s) if weight is None else weight.detach().contiguous()

    def _below(self, before: fx.Node, block: Block) -> Tensor:
        """The pool's or ReLU's input less what leaves the pool, of each window."""
        value, best = (self._operations.network.value(a) for a in (before, block.pool))
        rows, columns = (n * block.size for n in best.shape[-2:])
        spread = best.repeat_interleave(block.size, 2).repeat_interleave(block.size, 3)
        below = value.clone()
        below[..., :rows, :columns] -= spread
        return below


def _over_pixels(node: fx.Node) -> bool:
    """Whether a mean is that over the pixels of images."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, (tuple, list)) and {d % 4 for d in dims} == {2, 3} and len(dims) == 2


def _is_global(module: nn.Module | None) -> bool:
    return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
