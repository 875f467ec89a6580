"""Engine ``delta``: the change that each coordinate causes travels through the network, for a chunk of coordinates at once.

Two losses are never subtracted, so full relative precision is kept. Base values come from a float64 pass where the network has
kinks: a ReLU whose input lies within rounding of zero would stop a change, or let it pass, for no reason. Coordinates of one
parameter share all weights downstream, so a chunk of P coordinates is one batch of P B samples, and a change that lives in one
channel stays there as long as it can.
"""

import logging
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, fx, nn

from dzhpc.engines.batch import BatchEngine, changed
from dzhpc.engines.blackbox import BlackBoxLoss
from dzhpc.engines.budget import budget, most
from dzhpc.engines.delta.change import Change, Origin
from dzhpc.engines.delta.losschange import LossChange
from dzhpc.engines.delta.plan import PROBE, Plans, Route, Sized
from dzhpc.engines.delta.propagation import Propagation
from dzhpc.engines.delta.rules import table
from dzhpc.engines.kernels.compiled import Code, Programs
from dzhpc.engines.kernels.find import Kernels
from dzhpc.engines.losses import Loss, loss_of
from dzhpc.engines.network import untouched
from dzhpc.engines.protocol import AT_ONCE
from dzhpc.engines.reuse import Tails
from dzhpc.engines.traced import Traced, Traces, name_of, need_module
from dzhpc.errors import InputError, message_of
from dzhpc.job import device as devices
from dzhpc.method.coordinates import ParameterIndex, cut

log = logging.getLogger("dzhpc")
COPIES = 4  # of the largest change downstream that are alive at once
PLAIN_COPIES = 14  # where nothing is compiled: an operation's intermediate values, too
NAMED = 6  # operations of a route in an explanation


class Delta(BatchEngine):
    """As :class:`dzhpc.engines.full.Full`, to more digits and at a fraction of its cost.

    precision: "fp32": changes travel in the parameters' own type; "bf16": in bfloat16, statistics and losses as before.
    travel: any other type for changes to travel in, whatever ``precision`` says.
    memory_mb: chunks are cut so that their changes need no more MiB than this (None: a fixed default for each device type).
    largest: coordinates in a chunk at most (None: a fixed default for each device type).
    queries: that are to come; with the bytes of the first base pass's values they decide, once, whether a compiler pays.
        0: never; inf: always. Without a compiler no kernel of our own is made either.
    emulate: take "bf16" on hardware without bfloat16 products, where it is slower than "fp32" by far.

    Raises InputError for what is no module, has no parameters, or names no loss, and for bfloat16 without its products. ``bind``
    raises it for a model that :class:`dzhpc.engines.traced.Traces` refuses, ``cut``, ``differences`` where ``memory_mb`` is too
    small.
    """

    at_once = AT_ONCE

    def __init__(
        self,
        model: nn.Module,
        loss: str | Loss,
        precision: str = "fp32",
        memory_mb: float | None = None,
        travel: torch.dtype | None = None,
        largest: int | None = None,
        queries: float = math.inf,
        emulate: bool = False,
    ):
        need_module(model, "delta")
        super().__init__(ParameterIndex.of(model), model, loss_of(loss))
        if precision == "bf16" and not emulate and not devices.has_fast_bf16(self.index.device):
            raise InputError(
                'zo.precision = "bf16": this hardware has no bfloat16 products, and emulating them is slower than fp32 by far; '
                'use "fp32" (or force it by zo.emulate_bf16 = true)'
            )
        dtype, self._queries = self.index.dtype, queries
        self._limit = memory_mb * 2**20 if memory_mb else None
        self._largest = largest or most(self.index.device)
        self._said: set[str] = set()
        self.travel = travel or (torch.bfloat16 if precision == "bf16" else dtype)  # the type that changes are kept in
        self._narrow = self.travel != torch.float32 or dtype != torch.float32  # whether float64 base values gain nothing
        self._kernels = Kernels(self.index.device, dtype, self._say_once)
        self._loss_change = LossChange(self.loss, dtype, self._kernels)
        self._traces = Traces(model, self.index.parameters, self.loss, self._pinned, "delta", whole=table.MODULES)
        self._traced: Traced | None = None
        self._tails: Tails | None = None  # for what no rule serves
        self._propagation: Propagation | None = None
        self._plans: Plans | None = None
        self._outputs: Tensor | None = None  # at theta; None before the first base pass

    @property
    def environment(self) -> dict[str, str]:
        """See :class:`dzhpc.engines.protocol.Engine`; says once why nothing is compiled, where that is so."""
        return {"compiled": str(self._kernels.compiling), "kernels": self._kernels.names}

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling so far."""
        return self._kernels.seconds

    @property
    def base_bytes(self) -> int:
        """Memory of the batch's base values; 0 before the first ``bind``."""
        return self._traced.kept_bytes if self._traced else 0

    @property
    def peak_bytes(self) -> int:
        """Memory of the batch's base values and of what was derived from them so far; 0 before the first ``bind``."""
        if self._propagation is None:
            return 0
        held = {**self._traced.storages, **self._propagation.storages}
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}  # some operations read them as they are
        return sum(size for address, size in held.items() if address not in own)

    @property
    def routes(self) -> list[Route]:
        """How each parameter's changes reach the output, for the mode bound last; [] before the first ``bind``."""
        return self._plans.routes if self._plans else []

    @torch.no_grad()
    def bind(self, inputs: Tensor, targets: Tensor) -> float:
        """As :meth:`dzhpc.engines.full.Full.bind`."""
        self._begin()
        self.batch, self._outputs = (inputs, targets), None
        with untouched(inputs, self.model):
            self._follow(self._traces.current(inputs, targets, self._start, None))
            self._outputs = self._run_base(inputs)
            self._propagation.new_batch()
            self._loss_change.bind(self._outputs, targets)
            base = self._base_loss(self._outputs, targets)
        return self._bound(base)

    def cut(self, coords: np.ndarray) -> list[range]:
        """Chunks of one parameter each; so many coordinates that their changes fit into the memory budget."""
        owners = self.index.owner(coords)
        chunks = []
        for chunk in cut(owners, len(coords) or 1):
            size = self._size(int(owners[chunk.start]))
            chunks += [range(k, min(k + size, chunk.stop)) for k in range(chunk.start, chunk.stop, size)]
        return chunks

    @torch.no_grad()
    def differences(self, coords: Iterable[int], mu: float) -> Tensor:
        """l(theta + mu e_j) - l(theta) for each j in ``coords`` -> [n] in the parameters' dtype."""
        reduce = lambda change: self._loss_change(change, self._base)  # noqa: E731
        return self._by_chunks(coords, lambda chunk: self._evaluate_chunk(chunk, mu, self._one_by_one, reduce))

    @torch.no_grad()
    def responses(self, coords: Iterable[int], mu: float) -> Tensor:
        """z(theta + mu e_j) - z(theta) for each j in ``coords`` -> [n, *z.shape]; only answers of a black box are subtracted."""
        self._need_base()
        evaluate = lambda chunk: self._evaluate_chunk(chunk, mu, self._responses_singly, self._answer_change)  # noqa: E731
        return self._by_chunks(coords, evaluate, self._z.shape)

    @property
    def programs(self) -> Programs:
        """What is compiled."""
        return self._kernels.programs

    @torch.no_grad()
    def to_compile(self) -> list[Code]:
        """All programs that differences will need, not compiled yet; equal on all ranks, in one order. No query is counted."""
        self._need_base()
        with self._pinned.unchanged(), self.programs.waiting() as found:
            for owner in (k for k, r in enumerate(self.routes) if r.propagates and not r.taken_away and self.programs.compiling):
                change = self._chunk(owner, np.asarray(self.index.range(self.index.names[owner]))[:1], PROBE)
                if not self._loss_change.asks:
                    self._loss_change(change, self._base)
        self._propagation.new_batch()  # what a trial derived is not what chunks will ask for
        return found

    def explain(self) -> str:
        """See :class:`dzhpc.engines.protocol.Engine`; for the shape of the batch bound last."""
        lines = list(map(self._explain_one, range(len(self.index.names))))
        how = ", ".join(f"{key}: {value}" for key, value in self.environment.items())
        size, why = (self._limit, "zo.memory_mb") if self._limit else budget(self.index.device)
        chunk = f"changes of a chunk: at most {size / 2**20:g} MiB ({why}), and {self._largest} coordinates"
        return "\n".join([f"engine delta, {how}", chunk, *lines])

    def _explain_one(self, owner: int) -> str:
        sized, route = self._sized(owner), self.routes[owner]
        name = f"{self.index.names[owner]} {list(self.index.parameters[owner].shape)}"
        if not route.nodes:
            return f"{name}: the output does not depend on it"
        if route.taken_away:
            return f"{name}: a BatchNorm takes its changes away, since it subtracts each channel's mean"
        names = [name_of(node) for node in route.nodes[:-1]]
        operations = " ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        if route.refusal:
            return f"{name}: one coordinate at a time, since {route.refusal}; {operations}"
        merged = sum(run.fused for run in sized.runs)
        return f"{name}: {self._size(owner)} coordinates a chunk, {len(sized.runs)} runs, {merged} of them merged; {operations}"

    def _follow(self, traced: Traced) -> None:
        """Plan a new trace, which still holds the values of its first run."""
        if traced is self._traced:
            return
        if self._traced is None:
            self._kernels.weigh(self._queries, traced.kept_bytes)
        propagation = Propagation(traced, self.index.dtype, self.travel, self._kernels, self._say_once)
        self._plans = Plans(traced, propagation, self.index, lambda: self._kernels.compiling)
        self._traced, self._propagation, self._tails = traced, propagation, Tails(traced, len(self.index.names))

    def _run_base(self, inputs: Tensor) -> Tensor:
        """In float64 where that makes changes more accurate, and all changes start from these values."""
        if not self._narrow and self._plans.has_kinks and self._plans.all_propagate:
            try:
                return self._traced.run_wide(inputs)
            except Exception as error:  # a user's operation may be made for float32 alone, and then raise anything
                self._say_once(f"base values are float32's, since a float64 pass ends in {message_of(error)}")
                self._narrow = True
                self._pinned.rewind(self._start)
        return self._traced.run(inputs)

    def _size(self, owner: int) -> int:
        """How many coordinates of a parameter fit into the budget. Raises InputError if not one does."""
        every, sized = self.index.parameters[owner].numel(), self._sized(owner)
        promised = self._limit is not None and not self._kernels.compiling  # a cache need not hold all of it
        bytes_each = max(1, (PLAIN_COPIES if promised else COPIES) * sized.widest if sized else 0)
        if self._limit is not None and bytes_each > self._limit:
            raise InputError(
                f"zo.memory_mb = {self._limit / 2**20:g}: one coordinate of {self.index.names[owner]} needs "
                f"{bytes_each / 2**20:.1f} MiB at this batch size; raise it or use a smaller data.batch_size"
            )
        allowed = self._limit or budget(self.index.device)[0]
        return int(max(1, min(self._largest, allowed // bytes_each, every)))

    def _sized(self, owner: int) -> Sized | None:
        """For the shape of the batch bound last; it may be asked for long after that."""
        if self._outputs is None:
            self._need_base()
        shape = self.batch[0].shape
        if not self._plans.knows(shape):
            with torch.no_grad(), self._pinned.unchanged(), self._traces.as_traced():
                self._plans.measure(shape)
        return self._plans.sized(owner, shape)

    def _answer_change(self, of_outputs: Change) -> Tensor:
        """The change of z [P, ...] for a change of the outputs [B, ...]."""
        change = of_outputs.dense(self._outputs).to(self.index.dtype)
        if not isinstance(self.loss, BlackBoxLoss):
            return change
        self.loss.many(self._outputs + change, self.batch[1])
        return changed(self.loss.answered, self._z).to(self.index.dtype)

    def _evaluate_chunk(self, coords: np.ndarray, mu: float, singly: Callable, reduce: Callable) -> Tensor:
        """``reduce(change of the outputs)`` for coordinates [P] of one parameter, or ``singly(coords, mu)``; one 0 for all."""
        owner = self.index.owner_of(int(coords[0]))
        route = self.routes[owner]
        if route.refusal:
            self._say_once(f"{route.refusal}: evaluated one coordinate at a time")
        if not route.propagates:
            return singly(coords, mu)
        nothing = route.taken_away and not self._loss_change.asks
        found = self._outputs.new_zeros(()) if nothing else reduce(self._chunk(owner, coords, mu))
        self.queries += len(coords)
        return found

    def _chunk(self, owner: int, coords: np.ndarray, mu: float) -> Change:
        """The change of the outputs for coordinates [P] of one parameter."""
        if self.routes[owner].taken_away:
            return Change(self._outputs.new_zeros(len(coords), *self._outputs.shape))
        nodes, sized = self.routes[owner].nodes, self._sized(owner)
        first, output = nodes[0], nodes[-1].args[0]
        seed = self._propagation.seed(first, self.index.parameters[owner], coords - self.index.offsets[owner], mu)
        waits = self._propagation.waits(first, sized.runs)
        changes: dict[fx.Node, Change | Origin | list[Change]] = {first: seed if waits else seed.now()}
        for run, done in zip(sized.runs, sized.last_read, strict=True):
            self._propagation.advance(run, changes)
            for node in done:
                changes.pop(node, None)
        return changes[output]

    def _outputs_now(self, owner: int | None) -> Tensor:
        return self._tails.outputs(owner, self._outputs)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.info("engine delta: %s", text)
