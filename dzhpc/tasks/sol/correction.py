"""What a network adds to a state after each step of the coarse solver."""

import torch
from torch import Tensor, nn

from dzhpc.tasks import fitting
from dzhpc.tasks.sol.reference import Reference


class Correction:
    """state + sigma * model([state / sigma, parameter / sigma_parameter]), sigma the training data's, a number a channel.

    A channel is the first axis of a state with several axes; states [X] and [C, X] come to the model as [N, 1, 1, X] and
    [N, C, 1, X]. Staggered states come without their last row and column, which stay as the solver left them.
    Raises InputError for a model that does not give as many numbers as it is to correct.
    """

    def __init__(self, model: nn.Module, reference: Reference):
        first, scales = next(model.parameters()), reference.scales()
        self.model = model
        self.sigma = scales.masked_fill(scales == 0, 1).to(first.device, first.dtype)[:, None, None]  # [C, 1, 1]
        self.shape, self.entries = reference.shape, int(reference.where().sum())  # of a state
        self._by_sigma, self._by_parameter = 1 / self.sigma, 1 / reference.parameter_scale()
        self._staggered = reference.staggered
        channels_last = any(p.ndim == 4 and not p.is_contiguous() for p in model.parameters())
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        states = torch.zeros(2, *reference.shape).to(first)
        inputs, expected = self.inputs(states, states.new_ones(2)), list(self._seen(states).shape)
        fitting.try_out(model, inputs, expected, "the numbers that a correction has to be", type(model).__name__)

    def __call__(self, states: Tensor, parameters: Tensor) -> Tensor:
        """Corrected states [N, ...] of a simulation with the parameters [N]."""
        return self.add(states, self.model(self.inputs(states, parameters)))

    def inputs(self, states: Tensor, parameters: Tensor) -> Tensor:
        """What the model gets [N, C + 1, H, W]."""
        part = self._seen(states)
        n, c, h, w = part.shape
        parameters = (parameters * self._by_parameter).to(part)[:, None, None]
        if part.requires_grad:
            last = parameters[:, None].expand(n, 1, h, w)
            return torch.cat((part * self._by_sigma, last), 1).contiguous(memory_format=self._layout)
        inputs = torch.empty((n, c + 1, h, w), dtype=part.dtype, device=part.device, memory_format=self._layout)
        inputs[:, c] = parameters
        torch.mul(part, self._by_sigma, out=inputs[:, :c])
        return inputs

    def add(self, states: Tensor, outputs: Tensor) -> Tensor:
        """States [N, ...] + sigma * the model's outputs [N, C, H, W]."""
        corrected = states.clone(memory_format=torch.contiguous_format)
        self._seen(corrected).addcmul_(outputs, self.sigma)
        return corrected

    def _seen(self, states: Tensor) -> Tensor:
        """The view [N, C, H, W] that the model sees and corrects."""
        if self._staggered:
            return states[..., :-1, :-1]
        if states.ndim == 4:
            return states
        return states[:, None, None] if states.ndim == 2 else states[:, :, None]
