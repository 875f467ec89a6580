"""A look at the chosen engine before it is relied on: a few coordinates beside engine ``full``, and ``full`` beside itself.

It sees what a trace or a rule gets wrong, and networks that are another one at each query. On copies of the network in float64,
where rounding is far below what is compared; a mean error of a few percent passes, since no healthy network may be refused.
What is compiled is another thing, and is looked at once it is there.
"""

import copy
import logging
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from dzhpc.engines.delta.engine import Delta
from dzhpc.engines.full import Full
from dzhpc.engines.losses import LOSSES
from dzhpc.engines.network import NetworkEngine
from dzhpc.engines.pinned import OWN_STATE, Pinned
from dzhpc.engines.protocol import Engine
from dzhpc.engines.reuse import Reuse
from dzhpc.errors import InputError, message_of
from dzhpc.method.coordinates import ParameterIndex
from dzhpc.method.seeds import derive

log = logging.getLogger("dzhpc")
SAMPLES = 8  # of the batch: enough for BatchNorm to have something to average
PARAMETERS, EACH = 4, 2  # of a parameter so many coordinates, which delta takes as one chunk
STEP = 0.01  # mu, of a parameter's root mean square: what is wrong by a constant must show, too
RELATIVE = 0.02  # of a difference: what two engines may differ by
ABSOLUTE = 1e-9  # of the loss
SAME = 1e-4  # of the loss: what two engines may differ by at theta
NOISE = 5.0  # times by how much mu and -mu do not mirror each other: networks that round some of themselves, or take steps
COMPILED, LARGER = 0.25, 10.0  # of differences, for mu that many times STEP: what compiled passes may be off by
ROUNDED = {
    torch.float32: 1e-8,
    torch.bfloat16: 3e-6,
}  # of the loss, by the type that changes travel in: what no effect may look like


def check(engine: Engine, seed: int) -> str:
    """Compare on the batch that is bound, and say in one line what was found; "" where there is nothing to compare.

    Only for networks and losses of our own that cost nothing to ask: no black box, no solver. Nothing moves, neither parameters,
    buffers, random numbers, nor the engine's queries. Equal on all ranks for one seed.
    Raises InputError where engines disagree, or ``full`` with itself.
    """
    known = isinstance(engine, (Full, Reuse, Delta)) and engine.loss in LOSSES.values()
    if not known or not isinstance(engine.model, nn.Module):
        return ""
    kind = type(engine).__name__.lower()
    with Pinned(engine.model, engine.index.device).unchanged(), _quietly():
        try:
            engine.rewind()
            found = _ask(engine, seed)
        except InputError:
            raise
        except Exception as error:  # a copy, or a pass in float64, may fail in any way
            return f"engine {kind} was not tried beside full, since no copy of the network runs in float64: {message_of(error)}"
    name = type(engine.model).__name__
    wrong = f'engine "{kind}" is wrong about {name}; use zo.engine = "full"'
    found.compare(found.again, 0 * found.noise, f"{name} is another network at each query: {OWN_STATE}")
    if found.other is None:
        return f"engine {kind} gives the same again on {len(found.names)} coordinates"
    if abs(found.others - found.base) > SAME * abs(found.base):
        raise InputError(f"{wrong} (the loss at theta: {found.base:.6g} by full, {found.others:.6g})")
    found.compare(found.other, NOISE * found.noise, wrong)
    return f"engine {kind} agrees with full on {len(found.names)} coordinates to {found.error():.0e}"


def check_compiled(engine: Engine, seed: int) -> None:
    """Compare what is compiled with ``full``, in the precision of the run and on the batch that is bound; on a CPU.

    Two coordinates of the first parameter, whose changes pass all that follows, and of one in the middle; ``full`` on a copy of
    the network in float64. Nothing moves, as in :func:`check`. Raises InputError where they part.
    """
    compiles = isinstance(engine, Delta) and engine.programs.compiling and engine.loss in LOSSES.values()
    if not compiles or engine.index.device.type != "cpu":
        return
    chosen = {key: (elements, LARGER * mu) for key, (elements, mu) in list(_coordinates(engine.index, seed).items())[:2]}
    asked, batch = engine.queries, [t.double() if t.is_floating_point() else t for t in engine.batch]
    with Pinned(engine.model, engine.index.device).unchanged(), _quietly():
        engine.rewind()
        try:
            full = Full(_copy(engine.model, chosen), engine.loss)
            base, expected = full.bind(*batch), torch.cat(_differences(full, chosen))
        except Exception as error:  # as in check
            log.debug("what is compiled is not tried: %s", message_of(error))
            return
        found = torch.cat(_differences(engine, chosen)).double()
    engine.queries = asked
    room = COMPILED * float(torch.maximum(expected.norm(), found.norm())) + ROUNDED.get(engine.travel, 0.0) * abs(base)
    if float((found - expected).norm()) > room:
        numbers = "; ".join(f"{a:.4g} by full, {b:.4g}" for a, b in zip(expected.tolist(), found.tolist(), strict=True))
        what = f'what is compiled for engine "delta" is wrong about {type(engine.model).__name__}; use zo.compile = "off"'
        raise InputError(f"{what} ({', '.join(chosen)}: differences {numbers})")


@dataclass
class _Differences:
    """What was found for a few coordinates [n]: by engine full, by it again, and by the engine in question."""

    names: list[str]
    base: float  # the loss at theta, by engine full
    others: float  # the same by the engine in question
    full: Tensor
    again: Tensor
    noise: Tensor  # how far mu and -mu are from mirroring each other, the most of a parameter's coordinates
    other: Tensor | None

    def compare(self, other: Tensor, noise: Tensor, what: str) -> None:
        """Raise InputError that says ``what`` where two numbers part beyond all rounding; what is not finite parts from none."""
        scale = torch.maximum(self.full.abs(), other.abs())
        allowed = RELATIVE * scale + ABSOLUTE * abs(self.base) + noise.nan_to_num()
        apart = ((other - self.full).abs() - allowed).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
        worst = int(apart.argmax())
        if apart[worst] > 0:
            numbers = f"differences {float(self.full[worst]):.4g} by full, {float(other[worst]):.4g}"
            raise InputError(f"{what} ({self.names[worst]}: {numbers})")

    def error(self) -> float:
        """The largest difference from full, of the largest number."""
        return float((self.other - self.full).abs().nan_to_num().max() / self.full.abs().nan_to_num(1.0).max().clamp_min(1e-300))


def _ask(engine: Full | Reuse | Delta, seed: int) -> _Differences:
    """All evaluations, each of an engine over a copy of the network as it was when the batch was bound."""
    sample = [t[:SAMPLES].double() if t.is_floating_point() else t[:SAMPLES] for t in engine.batch]
    make = {Full: Full, Reuse: Reuse, Delta: partial(Delta, largest=EACH)}[type(engine)]
    chosen = _coordinates(engine.index, seed)
    names = [engine.index.describe(int(engine.index.range(key)[k])) for key, (elements, _) in chosen.items() for k in elements]
    engines = [kind(_copy(engine.model, chosen), engine.loss) for kind in dict.fromkeys([Full, make])]
    for twin in engines:
        twin.bind(*sample)
        twin.rewind()
        twin.bind(*sample)  # what a pass leaves for the next one, without being a buffer, is then there as it will be
    full, other = engines[0], engines[-1]
    first, again = _differences(full, chosen), _backwards(full, chosen)  # each query then follows upon another one
    back = _differences(full, chosen, -1.0)
    noise = [(a + b).abs().max().expand(len(a)) for a, b in zip(first, back, strict=True)]
    beside = None if other is full else torch.cat(_differences(other, chosen))
    return _Differences(names, full.base, other.base, torch.cat(first), torch.cat(again), torch.cat(noise), beside)


def _coordinates(index: ParameterIndex, seed: int) -> dict[str, tuple[np.ndarray, float]]:
    """Parameter, from the first to the last -> some of its elements, and mu for them."""
    draw, found = np.random.default_rng(derive(seed, "self-check")), {}
    for owner in sorted({int(k) for k in np.linspace(0, len(index.names) - 1, PARAMETERS).round()}):
        p = index.parameters[owner]
        elements = draw.choice(p.numel(), min(EACH, p.numel()), replace=False)
        found[index.names[owner]] = elements, STEP * (float(p.detach().square().mean().sqrt()) or STEP)
    return found


def _copy(model: nn.Module, trained: Container[str]) -> nn.Module:
    """The network in float64, its other parameters frozen: an engine makes plans for no more than it is asked for."""
    twin = copy.deepcopy(model).double()
    for name, p in twin.named_parameters():
        p.requires_grad_(name in trained)
    return twin


def _differences(engine: NetworkEngine, chosen: dict[str, tuple[np.ndarray, float]], factor: float = 1.0) -> list[Tensor]:
    return [engine.differences(engine.index.range(key)[elements], factor * mu).cpu() for key, (elements, mu) in chosen.items()]


def _backwards(engine: NetworkEngine, chosen: dict[str, tuple[np.ndarray, float]]) -> list[Tensor]:
    """:func:`_differences`, asked from the last coordinate to the first."""
    turned = {key: (elements[::-1].copy(), mu) for key, (elements, mu) in reversed(chosen.items())}
    return [found.flip(0) for found in reversed(_differences(engine, turned))]


@contextmanager
def _quietly() -> Iterator[None]:
    """Copies say again what the engine itself has said, or what is so in float64 alone."""
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)
