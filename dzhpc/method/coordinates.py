"""Coordinates: the trainable parameters as one flat vector theta [d]; chunks and slices of a coordinate set."""

import bisect
import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from dzhpc.errors import InputError


def _check_memory(parameters: Mapping[str, Tensor]) -> None:
    """Raise InputError where an element of memory belongs to two coordinates: neither could be perturbed alone.

    Parts of one storage that do not overlap are sound.
    """
    homes: dict[int, list[str]] = {}
    for name, p in parameters.items():
        if any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride(), strict=True)):
            raise InputError(f"elements of the parameter {name} share memory (expand()?); call .clone() on it first")
        if address := p.untyped_storage().data_ptr():  # 0: empty, or without memory at all
            homes.setdefault(address, []).append(name)
    for names in homes.values():
        if len(names) > 1:
            users = torch.zeros(
                parameters[names[0]].untyped_storage().nbytes() // parameters[names[0]].itemsize, dtype=torch.int8
            )
            for p in (parameters[name] for name in names):
                users.as_strided(p.shape, p.stride(), p.storage_offset()).add_(1)
            if users.max() > 1:
                raise InputError(
                    f"the parameters {', '.join(names)} share memory; make one Parameter, and use it, or its transpose, twice"
                )


class ParameterIndex:
    """Flat index <-> parameter, in ``named_parameters()`` order, row-major within a parameter.

    A tied parameter occurs once, under its first name. Frozen parameters (``requires_grad=False``) have no coordinates.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.offsets = np.cumsum([0] + [p.numel() for p in self.parameters])
        self._starts = self.offsets.tolist()
        if self.size == 0:
            raise InputError(
                "the model has no trainable parameter, so there is no coordinate to perturb; look at model.trainable"
            )
        dtypes = {p.dtype for p in self.parameters}
        if len(dtypes) > 1 or not self.dtype.is_floating_point:
            raise InputError(f"trainable parameters must share one floating-point dtype, found {sorted(map(str, dtypes))}")
        if self.dtype not in (torch.float32, torch.float64):  # theta + mu would be theta, and differences rounding
            raise InputError(f"trainable parameters are {str(self.dtype)[6:]}; expected float32 or float64 (call .float())")
        _check_memory(parameters)

    @classmethod
    def of(cls, model: torch.nn.Module) -> "ParameterIndex":
        """Those of a network. Raises InputError for a lazy module, which has no shape before its first pass, and a sparse one."""
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if is_lazy(t):
                raise InputError(f"{name} has no shape yet, being a lazy module's: give the module its sizes")
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, p in trainable.items():
            if p.layout != torch.strided:
                raise InputError(f"{name} is sparse; expected a dense parameter")
        return cls(trainable)

    @property
    def size(self) -> int:
        """d, the number of coordinates."""
        return int(self.offsets[-1])

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def owner(self, coords: np.ndarray) -> np.ndarray:
        """The parameter number of each coordinate [n]; raises InputError for one outside 0 <= j < d."""
        coords = np.asarray(coords)
        if coords.size and (coords.min() < 0 or coords.max() >= self.size):
            raise InputError(f"a coordinate lies outside 0..{self.size - 1}")
        return np.searchsorted(self.offsets, coords, side="right") - 1

    def owner_of(self, coord: int) -> int:
        """The parameter number of one coordinate 0 <= j < d, which is not checked."""
        return bisect.bisect_right(self._starts, coord) - 1

    def element(self, coord: int) -> tuple[int, Tensor]:
        """(parameter number, 0-dimensional view of the coordinate's element); any memory layout."""
        owner = int(self.owner(np.array([coord]))[0])
        parameter = self.parameters[owner]
        return owner, parameter.detach()[np.unravel_index(coord - self.offsets[owner], parameter.shape)]

    def describe(self, coord: int) -> str:
        """``layer1.0.conv1.weight[3, 0, 1, 2] (coordinate 512)``."""
        owner = int(self.owner(np.array([coord]))[0])
        place = np.unravel_index(coord - self.offsets[owner], self.parameters[owner].shape)
        return f"{self.names[owner]}{[int(i) for i in place]} (coordinate {coord})"

    def range(self, name: str) -> np.ndarray:
        """All coordinates of one parameter."""
        k = self.names.index(name)
        return np.arange(self.offsets[k], self.offsets[k + 1])

    def flatten(self, tensors: Iterable[Tensor]) -> Tensor:
        """One vector [d] from tensors in the parameters' order; gradients of nn.Embedding(sparse=True) are filled up."""
        return torch.cat([(t.to_dense() if t.is_sparse else t).reshape(-1) for t in tensors])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """name -> tensor of the parameter's shape (views of ``flat`` [d])."""
        pieces = flat.split([p.numel() for p in self.parameters])
        return {name: piece.view(p.shape) for name, p, piece in zip(self.names, self.parameters, pieces, strict=True)}


def cut(owners: np.ndarray, size: int) -> list[range]:
    """Cut positions 0..n-1 of a coordinate list into chunks: runs of one parameter, at most ``size`` long.

    The rule knows nothing of ranks, so that each coordinate's number is the same whoever computes it.
    """
    if len(owners) == 0:
        return []
    edges = np.flatnonzero(np.diff(owners)) + 1
    chunks = []
    for start, stop in zip([0, *edges], [*edges, len(owners)], strict=True):
        chunks += [range(int(k), int(min(k + size, stop))) for k in range(start, stop, size)]
    return chunks


def balance(costs: Sequence[float], ranks: int, groups: Sequence[int] | None = None, base: float = 0.0) -> list[list[int]]:
    """Longest-first: piece numbers for each rank so that the largest sum of costs is small; some may be empty.

    groups: the group of each piece; the first piece of a group costs a rank ``base`` more. Groups take turns, so that each comes
    to ranks of its own where there are enough.
    """
    slices, loads, groups = [[] for _ in range(ranks)], [0.0] * ranks, groups or [0] * len(costs)
    seen, turns = Counter(), []
    for group in groups:
        turns.append(seen[group])
        seen[group] += 1
    everyone = [(0.0, rank) for rank in range(ranks)]  # (load, rank): heaps, in which loads may have grown since
    members = {group: [] for group in seen}  # of the ranks that have pieces of a group
    for piece in sorted(range(len(costs)), key=lambda k: (-costs[k], turns[k], k)):
        own, new = members[groups[piece]], _least(everyone, loads)
        rank, joins = new[1], True
        if own and (old := _least(own, loads)) <= (new[0] + base, new[1]):
            rank, joins = old[1], False
        loads[rank] += costs[piece] + (base if joins else 0.0)
        if joins:
            heapq.heappush(own, (loads[rank], rank))
        slices[rank].append(piece)
    return [sorted(pieces) for pieces in slices]


def _least(heap: list[tuple[float, int]], loads: list[float]) -> tuple[float, int]:
    """The entry of the least loaded rank of a heap."""
    while heap[0][0] != loads[heap[0][1]]:
        heapq.heapreplace(heap, (loads[heap[0][1]], heap[0][1]))
    return heap[0]
