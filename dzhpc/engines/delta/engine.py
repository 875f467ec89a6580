"""Engine ``delta``: the change that each coordinate causes travels through the network, for a chunk of coordinates at once.

Two losses are never subtracted, so full relative precision is kept. Base values come from a float64 pass where the network has
kinks: a ReLU whose input lies within rounding of zero would stop a change, or let it pass, for no reason. Coordinates of one
parameter share all weights downstream, so a chunk of P coordinates is one batch of P B samples, and a change that lives in one
channel stays there as long as it can.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from dzhpc.engines.delta.change import Change, Origin, flattened
from dzhpc.engines.delta.differences import cross_entropy_difference, mse_difference
from dzhpc.engines.delta.fused import Run
from dzhpc.engines.delta.propagation import Propagation, name_of
from dzhpc.engines.delta.rules import table
from dzhpc.engines.full import LOSSES
from dzhpc.engines.kernels.find import Kernels
from dzhpc.engines.reuse import Reuse
from dzhpc.errors import InputError, message_of
from dzhpc.job import device as devices
from dzhpc.method.coordinates import cut

log = logging.getLogger("dzhpc")
BUDGET_MB = {"cpu": 32.0, "cuda": 4096.0}  # for a chunk's changes: a core's cache, a GPU's fill; never a guess from the machine
COPIES = 4  # of the largest change downstream that are alive at once
LARGEST = 64  # coordinates in a chunk: more would leave the last chunk of a layer emptier, and save little
SHAPE = {"size", "dim", "ndimension", "numel", "nelement", "shape", "ndim", "dtype", "device", "is_cuda"}


@dataclass
class _Plan:
    nodes: list[fx.Node]  # from the parameter's operation to the output; empty where the output does not depend on it
    refusal: str  # why no chunk can be propagated
    widest: int = 0  # bytes of the largest change that one coordinate makes
    runs: list[Run] | None = None  # the operations between
    last_read: list[list[fx.Node]] | None = None  # by each run: what no later one reads


class Delta(Reuse):
    """As :class:`Reuse`, to more digits and at a fraction of its cost.

    precision: "fp32": changes travel in the parameters' own type; "bf16": in bfloat16, statistics and losses as before.
    memory_mb: chunks are cut so that their changes need no more MiB than this (None: a fixed default for each device type).

    Raises InputError where torch.fx cannot trace the model, or where ``memory_mb`` is too small for one coordinate.
    """

    def __init__(self, model: nn.Module, loss: str | Callable, precision: str = "fp32", memory_mb: float | None = None):
        super().__init__(model, loss)
        self._keep_all, self._whole = True, table.MODULES
        self._limit = memory_mb * 2**20 if memory_mb else None
        self._loss_name = next((name for name, f in LOSSES.items() if f is self.loss), None)
        self._said: set[str] = set()
        self._travel = torch.bfloat16 if precision == "bf16" else self.index.dtype
        self._kernels = Kernels(self.index.device, self.index.dtype, self._say_once)
        self._propagation: Propagation | None = None
        self._all_plans: dict[torch.Size, list[_Plan]] = {}  # for each shape of a batch
        self._narrow = precision == "bf16" or self.index.dtype != torch.float32  # whether float64 base values gain nothing
        self._plans: list[_Plan] = []
        if precision == "bf16" and not devices.has_fast_bf16(self.index.device):
            self._say_once("this hardware has no fast bfloat16: precision = fp32 may be faster")

    def cut(self, coords: np.ndarray) -> list[range]:
        """Runs of one parameter; so many coordinates that their changes fit into the memory budget."""
        owners = self.index.owner(coords)
        chunks = []
        for chunk in cut(owners, len(coords) or 1):
            size = self._size(int(owners[chunk.start]))
            chunks += [range(k, min(k + size, chunk.stop)) for k in range(chunk.start, chunk.stop, size)]
        return chunks

    @torch.no_grad()
    def differences(self, coords, mu: float) -> Tensor:
        """l(theta + mu e_j) - l(theta) for each j in ``coords`` -> [n] in the parameters' dtype."""
        return self._by_chunks(coords, lambda chunk: self._evaluate_chunk(chunk, mu))

    def _evaluate_chunk(self, coords: np.ndarray, mu: float) -> Tensor:
        """Differences of some coordinates [n] of one parameter -> [n]."""
        owner = int(self.index.owner(coords[:1])[0])
        if self._plans[owner].refusal or not self._plans[owner].nodes:
            return self._one_by_one(owner, coords, mu)
        padded = np.pad(coords, (0, self._size(owner) - len(coords)), mode="edge")  # one shape, one program
        found = self._chunk(owner, padded, mu, len(coords))
        self.queries += len(coords)
        return found

    @property
    def compiling(self) -> bool:
        """Whether a compiler is at work; bits differ between with and without."""
        return self._kernels.compiling

    @property
    def cached_bytes(self) -> int:
        """Memory of the batch's base values and of what was derived from them."""
        return self._network.kept_bytes + self._propagation.cached_bytes

    def _run_base(self) -> Tensor:
        outputs = super()._run_base()
        self._propagation.new_batch()
        self._base_loss = self._prepare_loss(outputs)
        return outputs

    def _run_network(self) -> Tensor:
        if self._propagation is None or self._propagation.network is not self._network:
            self._propagation = Propagation(self._network, self.index.dtype, self._travel, self._kernels, self._say_once)
            self._all_plans.clear()
        if self._inputs.shape not in self._all_plans:
            outputs, learned = super()._run_network(), {}
            self._propagation.new_batch()
            self._all_plans[self._inputs.shape] = [self._plan(owner, learned) for owner in range(len(self.index.names))]
            if self._narrow:
                self._plans = self._all_plans[self._inputs.shape]
                return outputs
            self._rewind()
        self._plans = self._all_plans[self._inputs.shape]
        return self._run_wide() if self._gains_from_wide else super()._run_network()

    @property
    def _gains_from_wide(self) -> bool:
        """Whether base values in float64 make changes more accurate, and all changes start from them."""
        kinks = any(self._propagation.has_kink(plan.nodes) for plan in self._plans)
        return not self._narrow and kinks and not any(plan.refusal for plan in self._plans)

    def _run_wide(self) -> Tensor:
        try:
            return self._network.run_wide(self._inputs)
        except Exception as error:  # a user's operation may be made for float32 alone, and then raise anything
            self._say_once(f"base values are float32's, since a float64 pass ends in {message_of(error)}")
            self._narrow = True
            self._rewind()
            return super()._run_network()

    def _plan(self, owner: int, learned: dict) -> _Plan:
        """What lies between a parameter and the output, and why it cannot be done in one pass, if it cannot."""
        users = self._network.users(owner)
        nodes: list[fx.Node] = []
        for node in self._network.downstream(owner):
            if not self._is_constant(node) and (node in users or any(a in nodes for a in node.all_input_nodes)):
                nodes.append(node)
        plan = _Plan(nodes, "")
        if len(users) > 1:
            plan.refusal = f"{self.index.names[owner]} is shared by {len(users)} operations"
        for node in nodes:
            keywords: list[fx.Node] = []
            fx.map_arg(node.kwargs, keywords.append)
            if any(a in nodes for a in keywords):
                plan.refusal = f"{name_of(node)} takes a changing keyword argument"
            value = self._network.value(node) if node.op != "output" else node
            if not isinstance(value, (Tensor, fx.Node)) and not table.find(node, None).lists:
                plan.refusal = f"{name_of(node)} gives no tensor"
            if isinstance(value, Tensor) and not value.is_floating_point():
                plan.refusal = f"{name_of(node)} gives integers or truth values"
            if node.op == "call_method" and node.target.endswith("_"):
                plan.refusal = f"{name_of(node)} overwrites a buffer that is read again"
        if nodes and not plan.refusal:
            self._try_one(plan, owner, learned)
        return plan

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether an operation gives sizes and types, or numbers made of them: no perturbation changes these."""
        if node.op not in ("call_function", "call_method") or isinstance(self._network.value(node), Tensor):
            return False
        name = node.args[1] if node.target is getattr else node.target
        return name in SHAPE or (bool(node.all_input_nodes) and all(map(self._is_constant, node.all_input_nodes)))

    def _try_one(self, plan: _Plan, owner: int, learned: dict) -> None:
        """Propagate one coordinate to learn how large its changes are, and whether its operation has a seed for it."""
        first, *between = plan.nodes[:-1]
        seed = self._propagation.seed(first, self.index.parameters[owner], np.zeros(1, np.int64), 1e-3)
        if seed is None:
            plan.refusal = f"{name_of(first)} has no rule for its {self.index.names[owner]}"
            return
        kind = (first, seed.channel is None, seed.axis)
        if kind not in learned:  # parameters of one operation have what follows in common
            changes: dict[fx.Node, Change | list[Change]] = {first: seed.now()}
            self._propagation.try_out(between, changes)
            runs = self._propagation.runs(between, changes)
            if self.compiling:  # the others never reach memory
                changes = {a: c for a, c in changes.items() if any(a in run.leaving for run in runs) or a is first}
            if self._propagation.waits(first, runs):
                changes.pop(first)
            widest = max(c.data.numel() * c.data.element_size() for c in flattened(list(changes.values())))
            learned[kind] = (widest, runs, _last_read(runs, plan.nodes[-1].args[0]))
        plan.widest, plan.runs, plan.last_read = learned[kind]

    def _size(self, owner: int) -> int:
        """How many coordinates of a parameter fit into the budget. Raises InputError if not one does."""
        if not self._plans:  # they outlive a batch: sizes depend on shapes alone
            self._need_base()
        bytes_each = max(1, COPIES * self._plans[owner].widest)
        if self._limit is not None and bytes_each > self._limit:
            raise InputError(
                f"zo.memory_mb = {self._limit / 2**20:g}: one coordinate of {self.index.names[owner]} needs "
                f"{bytes_each / 2**20:.1f} MiB at this batch size; raise it or use a smaller data.batch_size"
            )
        budget = self._limit or BUDGET_MB[self.index.device.type] * 2**20
        every = self.index.parameters[owner].numel()
        fits = int(max(1, min(LARGEST, budget // bytes_each, every)))
        return fits if fits == every else 1 << (fits.bit_length() - 1)  # a power of two: fewer shapes to compile

    def _one_by_one(self, owner: int, coords: np.ndarray, mu: float) -> Tensor:
        """The exact way out, for parameters that no rule serves."""
        if self._plans[owner].refusal:
            self._say_once(f"{self._plans[owner].refusal}: evaluated one coordinate at a time")
        return Reuse.differences(self, coords, mu)

    def _chunk(self, owner: int, coords: np.ndarray, mu: float, count: int) -> Tensor:
        """Differences of the first ``count`` coordinates [P] of one parameter; the others fill the shape -> [count]."""
        plan, parameter = self._plans[owner], self.index.parameters[owner]
        first, output = plan.nodes[0], plan.nodes[-1].args[0]
        seed = self._propagation.seed(first, parameter, coords - self.index.offsets[owner], mu)
        waits = self._propagation.waits(first, plan.runs)
        changes: dict[fx.Node, Change | Origin | list[Change]] = {first: seed if waits else seed.now()}
        for run, done in zip(plan.runs, plan.last_read, strict=True):
            self._propagation.advance(run, changes)
            for node in done:
                changes.pop(node, None)
        return self._loss_difference(changes[output].dense(self._network.value(output)), count)

    def _prepare_loss(self, outputs: Tensor) -> Tensor | None:
        """What the loss's own difference needs of the base outputs; None where absolute values are subtracted instead."""
        targets = self._targets
        labels = targets.ndim == 1 and not targets.is_floating_point() and outputs.ndim == 2
        if self._loss_name == "cross_entropy" and labels and int(targets.min()) >= 0:  # no ignored samples
            return outputs.double().log_softmax(1).to(self.index.dtype)
        if self._loss_name == "mse" and outputs.shape == targets.shape:
            return (outputs.double() - targets.double()).to(self.index.dtype)
        return None

    def _loss_difference(self, change: Tensor, count: int) -> Tensor:
        """[count] from the change of the outputs [P, B, ...]; a black box is asked for no more than it has to be."""
        change = change.to(self.index.dtype)
        if self._base_loss is None:
            return self._subtracted_losses(change[:count])
        if self._loss_name == "mse":
            return self._kernels.call(mse_difference, self._base_loss, change)[:count]
        return self._kernels.call(cross_entropy_difference, self._base_loss, change, self._targets)[:count]

    def _subtracted_losses(self, change: Tensor) -> Tensor:
        """Absolute values, for a loss that is a black box: all coordinates in one call where it has ``many``."""
        if hasattr(self.loss, "many"):
            return (self.loss.many(self._outputs + change, self._targets) - self._base).to(self.index.dtype)
        return self._stack([self.loss(self._outputs + d, self._targets) - self._base for d in change])

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.info("engine delta: %s", text)


def _last_read(runs: list[Run], output: fx.Node) -> list[list[fx.Node]]:
    """For each run the operations whose changes it is the last to read; a chunk's memory is bounded by letting go of them."""
    found: list[list[fx.Node]] = []
    later = {output}
    for run in reversed(runs):
        read = {a for node in run.nodes for a in node.all_input_nodes}
        found.append([a for a in read if a not in later])
        later |= read
    return found[::-1]
