"""What a pass may move and must leave as it was: buffers, random numbers, parameters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@contextmanager
def kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Within, the tensors may be written to; afterwards they hold their saved values: subtracting mu again would not do."""
    tensors = list(tensors)
    saved = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        _put_back(tensors, saved)


@dataclass(frozen=True)
class Moment:
    """Buffers and states of the random number generators at some time."""

    buffers: list[Tensor]
    random: list[Tensor]


class Pinned:
    """The buffers of a model, and the random numbers that its forward pass may draw on ``device``: noted and put back.

    model: its buffers are pinned if it is a torch.nn.Module; any other callable has none.
    """

    def __init__(self, model: object, device: torch.device):
        self._buffers = list(model.buffers()) if isinstance(model, torch.nn.Module) else []
        self._device = device

    def note(self) -> Moment:
        """The present."""
        return Moment([b.clone() for b in self._buffers], _random_states(self._device))

    def rewind(self, moment: Moment) -> None:
        """Put buffers and random numbers back to what they were."""
        _put_back(self._buffers, moment.buffers)
        _set_random_states(moment.random, self._device)

    def has_drawn(self, moment: Moment) -> bool:
        """Whether a random number was drawn since."""
        return any(not torch.equal(a, b) for a, b in zip(moment.random, _random_states(self._device), strict=True))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Afterwards buffers and random numbers are as they were, also where what runs within raises."""
        moment = self.note()
        try:
            yield
        finally:
            self.rewind(moment)


@torch.no_grad()
def _put_back(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _random_states(device: torch.device) -> list[Tensor]:
    """Of every generator that a forward pass may use; the one place that knows them."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def _set_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
