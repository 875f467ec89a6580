"""What a pass may move and must leave as it was: buffers, random numbers, parameters."""

import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

#: why a network is not the same at each query
OWN_STATE = "it keeps state that is no buffer (register it), or draws from a random generator of its own (draw from torch's)"


@contextmanager
def kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Within, the tensors may be written to; afterwards they hold their saved values: subtracting mu again would not do."""
    tensors = list(tensors)
    saved = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        _put_back(tensors, saved)


def seed(value: int) -> None:
    """Seed every generator that a forward pass may draw from: torch's, NumPy's global one, and Python's ``random``."""
    torch.manual_seed(value)
    seed_others(value)


def seed_others(value: int) -> None:
    """As :func:`seed`, but for torch's, which every process begins with in one state."""
    np.random.seed(value % 2**32)
    random.seed(value)


@dataclass(frozen=True)
class Generator:
    """A random number generator that everybody draws from: its state as bytes, and the way back to one."""

    name: str
    state: Callable[[], bytes]
    go_to: Callable[[bytes], None]


@dataclass(frozen=True)
class Moment:
    """Buffers and states of the random number generators at some time.

    registered: module by module; tensors: all that there are, with copies of their ``values``.
    """

    registered: list[tuple[nn.Module, dict[str, Tensor | None]]]
    tensors: list[Tensor]
    values: list[Tensor]
    random: dict[Generator, bytes]


class Pinned:
    """The buffers of a model, and the random numbers that its forward pass may draw on ``device``: noted and put back.

    model: its buffers are pinned if it is a torch.nn.Module, also where a pass registers others in their place; any other
    callable has none. Generators of a user's own (``numpy.random.default_rng``) cannot be pinned: nobody knows of them.
    """

    def __init__(self, model: object, device: torch.device):
        self._modules = list(model.modules()) if isinstance(model, nn.Module) else []
        self._generators = _generators(device)
        self._watched = self._generators

    def begin(self) -> Moment:
        """The present, at which a base pass begins."""
        self._watched = self._generators
        return self.note()

    def settle(self, start: Moment) -> None:
        """The base pass is over: of NumPy's and Python's generators those that it left alone are no longer looked after.

        Their states are large, and noting them would cost a small network much of a query.
        """
        self._watched = [g for g in self._generators if g.name.startswith("torch") or g.state() != start.random[g]]

    def note(self) -> Moment:
        """The present."""
        registered = [(m, dict(m._buffers.items())) for m in self._modules]
        tensors = [b for _, buffers in registered for b in buffers.values() if b is not None]
        return Moment(registered, tensors, _copies(tensors), {g: g.state() for g in self._watched})

    def rewind(self, moment: Moment) -> None:
        """Put buffers and random numbers back to what they were."""
        for module, registered in moment.registered:
            if registered or module._buffers:
                _register(module, registered)
        _put_back(moment.tensors, moment.values)
        for generator in self._watched:
            generator.go_to(moment.random[generator])

    def drawn(self, moment: Moment) -> str:
        """The generator from which a random number was drawn since, "" where none was."""
        return next((g.name for g in self._watched if g.state() != moment.random[g]), "")

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Afterwards buffers and random numbers are as they were, also where what runs within raises."""
        moment = self.note()
        try:
            yield
        finally:
            self.rewind(moment)


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    values = [torch.empty_like(t) if _plain(t) else t.clone() for t in tensors]
    _put_back([v for v in values if _plain(v)], [t for t in tensors if _plain(t)])
    return values


@torch.no_grad()
def _put_back(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Copy values; one launch for all of a kind, of which a network has dozens (a device would wait for each)."""
    kinds: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}
    for tensor, value in zip(tensors, values, strict=True):
        if _plain(tensor) and _plain(value):
            into, of = kinds.setdefault((tensor.dtype, tensor.device), ([], []))
            into.append(tensor)
            of.append(value)
        else:
            tensor.copy_(value)
    for into, of in kinds.values():
        torch._foreach_copy_(into, of)


def _plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized


def _register(module: nn.Module, registered: dict[str, Tensor | None]) -> None:
    """Put back which tensors are a module's buffers."""
    now = dict(module._buffers.items())
    for key in now.keys() - registered.keys():
        del module._buffers[key]
    for key, tensor in registered.items():
        if key not in now or now[key] is not tensor:
            module._buffers[key] = tensor


def _generators(device: torch.device) -> list[Generator]:
    """Every generator that a forward pass may use; the one place that knows them."""
    found = [Generator("torch", _bytes_of(torch.get_rng_state), lambda state: torch.set_rng_state(_tensor(state)))]
    if device.type == "cuda":
        set_cuda = lambda state: torch.cuda.set_rng_state(_tensor(state), device)  # noqa: E731
        found.append(Generator("torch.cuda", _bytes_of(lambda: torch.cuda.get_rng_state(device)), set_cuda))
    numpy = Generator(
        "NumPy's global generator",
        lambda: pickle.dumps(np.random.get_state(legacy=False)),
        lambda state: np.random.set_state(pickle.loads(state)),
    )
    python = Generator(
        "Python's random", lambda: pickle.dumps(random.getstate()), lambda state: random.setstate(pickle.loads(state))
    )
    return [*found, numpy, python]


def _bytes_of(state: Callable[[], Tensor]) -> Callable[[], bytes]:
    return lambda: state().numpy().tobytes()


def _tensor(state: bytes) -> Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
