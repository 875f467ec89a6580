"""Gradients by another backward pass. The forward pass is the network's own, bit for bit; the error comes back another way.

FA (Lillicrap et al. 2016): where the error passes a layer, a fixed random B of the weight's shape stands for W:
    delta_l = phi'(x_l) * B_(l+1)^T delta_(l+1);  dW_l = delta_l h_(l-1)^T
DFA (Nokland 2016): the error e at the output goes straight to each hidden layer: delta_l = phi'(x_l) * B_l e
Align-ada (Boopathy and Fiete 2022): the error goes back through the network as it was at the start, W0, run on the same batch,
    delta_l = phi'(x0_l) * W0_(l+1)^T delta_(l+1);  dW_l = delta_l h_(l-1)^T with the activities h of now
Align-zero: with the activities of the start, too: the gradient of the linearised network, with the error of now.
Everything but the layers (normalisation, activation, pooling) is differentiated exactly, and so is the last layer.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dzhpc.errors import InputError
from dzhpc.method.estimators import FirstOrder
from dzhpc.method.following import ACTIVATIONS, LAYERS, Both, Followed, layers_of, name_of
from dzhpc.method.seeds import generator

Matrices = Callable[[int, int, int], Tensor]  # (which hidden layer, its size, that of the output) -> [size, output]


def feedback_alignment(model: nn.Module, inputs: Tensor, feedback: Mapping[str, Tensor]) -> Tensor:
    """The model's outputs; ``feedback``: parameter name -> B of its shape. Raises InputError for what it cannot follow."""
    with (mode := _Random(model, inputs, "fa", feedback)):
        outputs = model(inputs)
    return mode.outputs(outputs)


def direct_feedback(model: nn.Module, inputs: Tensor, matrices: Matrices) -> Tensor:
    """The model's outputs. Feedback enters behind every activation, and where there is none between two layers, behind the first.

    Raises InputError for what it cannot follow.
    """
    with (mode := _Direct(model, inputs, "dfa")):
        outputs = model(inputs)
    outputs = mode.outputs(outputs)
    flat, paths = outputs.flatten(1), []
    for k, hidden in enumerate(mode.fed):
        if hidden.shape[:1] != outputs.shape[:1]:
            mode.refuse(f"a hidden layer gives {list(hidden.shape)}; expected {outputs.shape[0]} samples first")
        h = hidden.flatten(1)
        paths.append(h @ matrices(k, h.shape[1], flat.shape[1]).to(h))
    return Both.apply(outputs, sum(paths).view_as(outputs)) if paths else outputs


def aligned(model: nn.Module, inputs: Tensor, start: Mapping[str, Tensor], layers: int) -> Tensor:
    """The model's outputs, for Align-ada; ``start``: parameter name -> W0, ``layers``: what :func:`layers_of` gives.

    Raises InputError for what is no chain of layers.
    """
    with (mode := _Aligned(model, inputs, "align-ada", start)):
        mode.last = layers
        outputs = model(inputs)
    outputs = mode.outputs(outputs)
    if mode.layers != layers:
        mode.refuse(f"the network has now {layers}, now {mode.layers} layers")
    return Both.apply(outputs, mode.known(outputs)[0])


def linearised(model: nn.Module, inputs: Tensor, start: Mapping[str, Tensor]) -> Tensor:
    """The model's outputs, for Align-zero: the gradient is J(W0)^T e."""
    at_start = {key: Both.apply(start[key], p) for key, p in model.named_parameters()}
    buffers = {key: b.clone() for key, b in model.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng():  # the second pass draws the same random numbers
        outputs = model(inputs)
    return Both.apply(outputs, torch.func.functional_call(model, (at_start, buffers), (inputs,)))


class _Random(Followed):
    """The gradient of a layer's weight by its own input, the error to what lies below by the other weights."""

    def operation(self, func: Callable, args: tuple, kwargs: dict, data: list[Tensor], weighted: bool) -> object:
        if not (weighted and name_of(func) in LAYERS) or not any(x.requires_grad for x in data):
            return func(*args, **kwargs)
        own = self.replaced((args, kwargs), Tensor.detach)
        back = self.replaced((args, kwargs), lambda x: x, weights=True)
        return Both.apply(func(*own[0], **own[1]), func(*back[0], **back[1]))


class _Direct(Followed):
    """Known of a value: the hidden values, behind activations, that it was made of since the last layer; None: none yet.

    They are ``fed`` as soon as another layer takes them; nothing flows back from there.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, name: str):
        super().__init__(model, inputs, name)
        self.fed: list[Tensor] = []

    def first(self, inputs: Tensor) -> list[Tensor]:
        return []

    def operation(self, func: Callable, args: tuple, kwargs: dict, data: list[Tensor], weighted: bool) -> object:
        hidden = [self.known(x) for x in data]
        layer = weighted and name_of(func) in LAYERS
        if layer:
            for x in data:
                self._feed([x] if self.known(x) is None else self.known(x))
            args, kwargs = self.replaced((args, kwargs), Tensor.detach)
        elif (weighted or None in hidden) and any(h is not None for h in hidden):  # the layer's own part begins again, or goes on
            for h in hidden:
                self._feed(h or [])
            ends = {id(x) for x, h in zip(data, hidden, strict=True) if h is not None}
            args, kwargs = self.replaced((args, kwargs), lambda x: x.detach() if id(x) in ends else x)
        out = func(*args, **kwargs)
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(value, Tensor):
                continue
            if layer or weighted or None in hidden:
                self.note(value, [value] if name_of(func) in ACTIVATIONS and not weighted else None)
            else:
                self.note(value, list({id(t): t for h in hidden for t in h}.values()))
        return out

    def _feed(self, hidden: list[Tensor]) -> None:
        for h in hidden:
            if h.requires_grad and not any(h is f for f in self.fed):
                self.fed.append(h)


class _Aligned(Followed):
    """Known of a value: (the value in the network of the start, whether the error has joined since the last layer).

    The error joins in front of an activation, that of the last hidden layer in front of the last layer.
    """

    last = 0  # layers in all

    def first(self, inputs: Tensor) -> tuple[Tensor, bool]:
        return inputs, True

    def operation(self, func: Callable, args: tuple, kwargs: dict, data: list[Tensor], weighted: bool) -> object:
        name = name_of(func)
        if len(data) > 1:
            self.refuse(f"takes a chain of layers; {name} joins two branches")
        (x,), (twin, joined) = data, self.known(data[0])
        layer = weighted and name in LAYERS
        joins = name in ACTIVATIONS and 0 < self.layers < self.last - 1
        if not joined and (layer or joins):
            twin, joined = Both.apply(twin, x), True
        start = self.replaced((args, kwargs), lambda _: twin, weights=True)
        state = torch.get_rng_state() if "dropout" in name else None
        other = func(*start[0], **start[1])
        if state is not None:
            torch.set_rng_state(state)
        if layer:
            args, kwargs = self.replaced((args, kwargs), Tensor.detach)
        out = func(*args, **kwargs)
        if joins and isinstance(out, Tensor):
            out = out.detach()  # all of its error has come by the other network
        several = isinstance(out, (tuple, list))
        for a, b in zip(out, other, strict=True) if several else [(out, other)]:
            if isinstance(a, Tensor):
                self.note(a, (b, joined and not weighted))
        return out


class _Feedback(FirstOrder):
    """A gradient by autograd whose pass back is altered; on every rank, over the whole batch."""

    def combine(self, engine, coords, step: int, values: Tensor) -> Tensor:
        flat = engine.index.flatten(engine.gradient(lambda inputs: self.outputs(engine.model, inputs)))
        return flat[torch.from_numpy(coords).to(flat.device)]

    def check(self, engine) -> None:
        """Raises InputError for a network whose pass it cannot follow."""
        self.begin(engine)
        engine.gradient(lambda inputs: self.outputs(engine.model, inputs))

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """The model's outputs, with the altered way back."""
        raise NotImplementedError


class FeedbackAlignment(_Feedback):
    """B ~ N(0, s^2), s the root mean square of the weight at the start (1 / sqrt(fan-in) where that is 0)."""

    def begin(self, engine) -> None:
        need_network(engine, self.zo.estimator)
        self._scale = {key: _rms(p) for key, p in engine.model.named_parameters() if p.ndim > 1}
        self._matrices: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        return {key: torch.tensor(value, dtype=torch.float64) for key, value in self._scale.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._scale, self._matrices = {key: float(value) for key, value in state.items()}, {}

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        if not self._matrices:
            self._matrices = {key: self._matrix(key, p) for key, p in model.named_parameters()}
        return feedback_alignment(model, inputs, self._matrices)

    def _matrix(self, key: str, p: Tensor) -> Tensor:
        if key not in self._scale:  # a bias, a factor of a normalisation: the error passes it as it is
            return p.detach()
        drawn = torch.randn(p.shape, generator=generator(self.seed, f"feedback {key}"), dtype=p.dtype)
        return torch.empty_like(p).copy_(self._scale[key] * drawn)


class DirectFeedbackAlignment(_Feedback):
    """B_l ~ N(0, 1/n), n the size of a hidden layer: of all pixels and channels."""

    def begin(self, engine) -> None:
        need_network(engine, self.zo.estimator)
        self._matrices: dict[tuple[int, int, int], Tensor] = {}

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return direct_feedback(model, inputs, self._matrix)

    def _matrix(self, k: int, size: int, outputs: int) -> Tensor:
        if (k, size, outputs) not in self._matrices:
            drawn = torch.randn(size, outputs, generator=generator(self.seed, "direct feedback", k)) / size**0.5
            self._matrices[k, size, outputs] = drawn
        return self._matrices[k, size, outputs]


class AlignAda(_Feedback):
    """W0, the weights at the start, is kept in the checkpoint."""

    def begin(self, engine) -> None:
        need_network(engine, self.zo.estimator)
        self._start = {key: p.detach().clone() for key, p in engine.model.named_parameters()}
        self._layers: int | None = None

    def state(self) -> dict[str, Tensor]:
        return self._start

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for key, value in state.items():
            self._start[key].copy_(value)

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        self._layers = self._layers or layers_of(model, inputs, self.zo.estimator)
        return aligned(model, inputs, self._start, self._layers)


class AlignZero(AlignAda):
    """As Align-ada, with the activities of the start."""

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return linearised(model, inputs, self._start)


def _rms(p: Tensor) -> float:
    rms = float(p.detach().double().square().mean().sqrt())
    return rms or (p[0].numel() or 1) ** -0.5


def need_network(engine, name: str) -> None:
    """Raise InputError for an engine that is not over a network of ours."""
    if not isinstance(getattr(engine, "model", None), nn.Module):
        raise InputError(f'zo.estimator = "{name}": needs a torch.nn.Module that it can see into')
