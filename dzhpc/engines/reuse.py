"""Engine ``reuse``: the paper's feature reuse for any traceable network.

Base features are kept once per batch; a query re-runs only the operations downstream of the perturbed parameter, or,
for a direction over all parameters, of the first of them.
"""

from collections.abc import Callable, Container

import torch
from torch import Tensor

from dzhpc.engines.full import Full
from dzhpc.engines.traced import Network
from dzhpc.errors import InputError


class Reuse(Full):
    """As :class:`Full`, to the same bits, at the cost of a partial forward pass per coordinate.

    Raises InputError for a model that torch.fx cannot trace, that draws random numbers in its forward pass, or whose trace
    does not reproduce it.
    """

    def __init__(self, model: torch.nn.Module, loss: str | Callable, memory_mb: float | None = None):
        if not isinstance(model, torch.nn.Module):
            raise InputError(f'engine "{self.name}" needs a torch.nn.Module; use engine = "full" for other callables')
        super().__init__(model, loss)
        self._memory_mb = memory_mb
        self._keep_all = False
        self._whole: Container[type] = ()  # layers of users that a trace does not look into
        self._modes: list[bool] | None = None

    @property
    def name(self) -> str:
        """As ``zo.engine`` has it."""
        return type(self).__name__.lower()

    def _run_base(self) -> Tensor:
        modes = [m.training for m in self.model.modules()]
        if modes != self._modes:  # train and eval trace differently
            self._network = Network(self.model, self.index.parameters, self._keep_all, self.name, self._whole)
            self._check_trace()
            self._modes = modes
        outputs = self._run_network()
        self.peak_bytes = self._network.kept_bytes
        if self._memory_mb is not None and self.peak_bytes > self._memory_mb * 2**20:
            raise InputError(
                f"zo.memory_mb = {self._memory_mb:g}: the kept features of this batch need {self.peak_bytes / 2**20:.0f} MiB; "
                f'raise it, use a smaller data.batch_size, or engine = "full"'
            )
        self._outputs = outputs
        return outputs

    def _run_network(self) -> Tensor:
        return self._network.run(self._inputs)

    def _run_perturbed(self, owner: int | None) -> Tensor:
        outputs = self._network.tail(owner)
        return self._outputs if outputs is None else outputs

    def _check_trace(self) -> None:
        """Compare trace and model once: the safety net under aliasing and control flow that a trace cannot see."""
        random: list[str] = []

        def note_random(node):
            if not random and any(not torch.equal(a, b) for a, b in zip(self._rng, self._rng_states(), strict=True)):
                random.append(getattr(node.target, "__name__", str(node.target)))

        try:
            traced = self._network.run(self._inputs, observe=note_random)
        finally:
            self._rewind()
        if random:
            raise InputError(
                f"{type(self.model).__name__} draws random numbers in {random[0]} (dropout?), which a partial pass "
                f'(engine "{self.name}") cannot repeat; use engine = "full"'
            )
        expected = self.model(self._inputs)
        self._rewind()
        a, b = self.loss(traced, self._targets), self.loss(expected, self._targets)
        if not torch.allclose(a, b, rtol=1e-5, equal_nan=True):
            raise InputError(
                f'engine "{self.name}": the trace of {type(self.model).__name__} does not reproduce it; use engine = "full"'
            )
