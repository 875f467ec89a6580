"""Many queries through one network, one perturbed weight each: all weights are shared, what differs is of rank one.

Perturbing one weight by mu adds mu * (its input, shifted) to one output channel of its layer, perturbing a bias adds mu.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from dzhpc.engines.windows import borders, padded, seen, window_of
from dzhpc.errors import InputError
from dzhpc.method.arrays import on_device
from dzhpc.method.coordinates import ParameterIndex

TRIED = 0.5  # the perturbation of a trial: large enough to show in any precision
ADVICE = 'use zo.engine = "full"'


class RankOne:
    """Lets a model take P perturbed queries of B samples each as one batch of P B, query 0's samples first.

    Its trainable parameters are weights and biases of Conv2d and Linear modules, used once or several times, by one module or
    several; its other operations treat every sample by itself, and leave nothing to chance. :func:`try_out` sees to that.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._users = _users(model)
        self.part_late = [False] * len(self._users)  # parameters up to whose layer queries with one input may stay together

    @contextmanager
    def perturbed(self, owner: int, elements: np.ndarray, mu: float, together: bool = False) -> Iterator[None]:
        """Within, query k of [P] sees element ``elements[k]`` of parameter ``owner`` moved by mu.

        together: the model gets B samples, the same for all queries, which part in the perturbed layer.
        """
        hooks = [m.register_forward_hook(_Added(m, is_bias, elements, mu, together)) for m, is_bias in self._users[owner]]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def first(self, owner: int, elements: np.ndarray, mu: float, inputs: Tensor) -> Tensor:
        """Outputs [P B, ...] for inputs [B, ...] that all queries have in common."""
        together = self.part_late[owner]
        with self.perturbed(owner, elements, mu, together):
            return self.model(inputs if together else repeated(inputs, len(elements)))


class _Added:
    """The hook of one module: adds to its outputs, in place, what the perturbations of its weight or bias add."""

    def __init__(self, module: nn.Module, is_bias: bool, elements: np.ndarray, mu: float, together: bool):
        self._mu, self._together, device = mu, together, module.weight.device
        shape = module.bias.shape if is_bias else module.weight.shape
        place = np.stack(np.unravel_index(elements, shape))
        if not is_bias and isinstance(module, nn.Conv2d):
            place[1] += place[0] // (module.out_channels // module.groups) * shape[1]
        self._query = torch.arange(len(elements), device=device)
        self._out, *self._in = on_device(place, device)

    def __call__(self, module: nn.Module, args: tuple, outputs: Tensor) -> Tensor:
        inputs, count = args[0], len(self._query)
        if self._together:
            self._together = False
            inputs, outputs = inputs.expand(count, *inputs.shape), repeated(outputs, count)
        else:
            inputs = inputs.unflatten(0, (count, -1))
        parted = outputs.unflatten(0, (count, -1))
        if isinstance(module, nn.Linear):
            parted[self._query, ..., self._out] += self._mu * (inputs[self._query, ..., self._in[0]] if self._in else 1)
        else:
            parted[self._query, :, self._out] += self._mu * (self._shifted(module, inputs) if self._in else 1)
        return outputs

    def _shifted(self, conv: nn.Conv2d, inputs: Tensor) -> Tensor:
        """What each query's weight is multiplied with [P, B, H', W']: its input channel, padded, at its place in the kernel."""
        channel, down, right = self._in
        wide = padded(inputs[self._query, :, channel], borders(conv), conv.padding_mode)
        return seen(wide.contiguous(), window_of(conv))[self._query, down, right]


def try_out(model: nn.Module, sample: Tensor) -> tuple[RankOne, int]:
    """(a model for P queries, elements of the largest output of its layers for one sample), tried on inputs [B, ...].

    The trial is on a copy with random weights: those of a beginning may hide a fault behind zeros. Raises InputError that names
    a parameter whose perturbed outputs are wrong.
    """
    network, trial = RankOne(model), RankOne(copy.deepcopy(model))
    index = ParameterIndex.of(trial.model)
    with torch.no_grad(), torch.random.fork_rng([index.device] if index.device.type == "cuda" else []):
        _draw_weights(trial.model)
        base, widest = _measured(trial.model, sample)
        for owner, parameter in enumerate(index.parameters):
            elements = np.unique([0, parameter.numel() - 1])
            true = torch.cat([_moved(trial.model, sample, parameter, k) for k in elements])
            tolerance = 1e-3 * (true - repeated(base, len(elements))).abs().max() + 1e-5 * base.abs().max()
            right = lambda found: found.shape == true.shape and bool((found - true).abs().max() <= tolerance)  # noqa: E731,B023
            with trial.perturbed(owner, elements, TRIED):
                if not right(trial.model(repeated(sample, len(elements)))):
                    raise InputError(
                        f"{index.names[owner]}: more than its module depends on it, or samples depend on each other or on "
                        f"chance (BatchNorm, Dropout in training); {ADVICE}"
                    )
            try:
                with trial.perturbed(owner, elements, TRIED, together=True):
                    network.part_late[owner] = right(trial.model(sample))
            except RuntimeError:  # a way around the layer: those who parted meet one who did not
                pass
    return network, widest


def repeated(x: Tensor, count: int) -> Tensor:
    """[B, ...] -> [count B, ...] in the same layout."""
    return torch.cat([x] * count)


def _users(model: nn.Module) -> list[list[tuple[nn.Module, bool]]]:
    """For each trainable parameter the modules that have it, and whether as a bias. Raises InputError."""
    index = ParameterIndex.of(model)
    place = {id(p): k for k, p in enumerate(index.parameters)}
    users: list[list[tuple[nn.Module, bool]]] = [[] for _ in place]
    for module in model.modules():
        for key, p in module._parameters.items():
            if id(p) not in place:
                continue
            if not isinstance(module, (nn.Conv2d, nn.Linear)):
                name = index.names[place[id(p)]]
                raise InputError(f"{name} belongs to {type(module).__name__}, neither a Conv2d nor a Linear module; {ADVICE}")
            users[place[id(p)]].append((module, key == "bias"))
    return users


def _draw_weights(model: nn.Module) -> None:
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=draw) / max(1, prod(p.shape[1:])) ** 0.5)


def _measured(model: nn.Module, sample: Tensor) -> tuple[Tensor, int]:
    """(outputs, elements of the largest output of a module for one sample)."""
    sizes = [0]
    note = lambda module, args, out: sizes.append(out.numel() if isinstance(out, Tensor) else 0)  # noqa: E731
    hooks = [module.register_forward_hook(note) for module in model.modules()]
    outputs = model(sample)
    for hook in hooks:
        hook.remove()
    return outputs, max(sizes) // len(sample)


def _moved(model: nn.Module, sample: Tensor, parameter: Tensor, element: int) -> Tensor:
    """The outputs with one element really moved."""
    at = np.unravel_index(element, parameter.shape)
    saved = parameter[at].clone()
    parameter[at] += TRIED
    outputs = model(sample)
    parameter[at] = saved
    return outputs
