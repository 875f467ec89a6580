"""A look at a run's first estimate: signal against rounding, noise, curvature, the exact gradient; and what to change."""

import logging

import numpy as np
import torch

from dzhpc.config import Config
from dzhpc.engines.delta.engine import Delta
from dzhpc.engines.losses import LOSSES
from dzhpc.engines.network import NetworkEngine
from dzhpc.errors import DzhpcError, InputError
from dzhpc.method.estimators import Estimator, autograd

log = logging.getLogger("dzhpc")
FEW = 30  # units in the last place: below that rounding is a few percent of a difference
CURVED = 0.3  # of the slope: above that a forward difference leans on mu
ALIKE = 0.9  # cosine to the exact gradient, of CGE
LARGE = 2**28  # bytes that a base pass keeps: above that a backward pass beside it may not fit


def sides(engine, estimator: Estimator, coords: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positions in S = ``coords``, differences there for mu, again, and for -mu): three coordinates, evenly spaced."""
    positions = np.unique(len(coords) * np.arange(1, 4) // 4)
    if not estimator.by_coordinate:
        positions = positions[:0]
    up, down = (engine.differences(coords[positions], sign * estimator.zo.mu).double().cpu().numpy() for sign in (1, -1))
    return positions, up, down


def look(
    engine, estimator: Estimator, coords: np.ndarray, loss: float, estimate: torch.Tensor, config: Config, asks: bool = True
) -> str:
    """One line about an estimate on S = ``coords``, whose batch is bound.

    asks: whether some coordinates are asked again, and for -mu, and a white box for its gradient.
    Nothing of the run changes, and these queries are not counted. "" where there is nothing to say, or a black box fails.
    """
    said: list[str] = []
    advice: list[str] = []
    g = estimate.detach().double().cpu().numpy()
    try:
        if config.zo.estimator in ("cge", "rge", "fzoo") and len(g) and not g.any():
            said.append("no perturbation changed the loss")
            advice.append(f"raise zo.mu (now {estimator.zo.mu:g}), or see that the loss depends on theta")
        if estimator.by_coordinate and g.any():
            subtracts = not isinstance(engine, Delta) and config.optim.name != "gauss-newton"
            wide = not isinstance(engine, NetworkEngine) and float(torch.tensor(loss).float()) != loss  # whatever theta is
            dtype = torch.float64 if wide else engine.index.dtype
            units = signal(g, estimator.zo.mu, loss, dtype) if subtracts else np.inf
            if subtracts:
                said.append(f"differences of {units:.3g} units in the last place of the loss")
            found = sides(engine, estimator, coords) if asks else (np.zeros(0, int), np.zeros(0), np.zeros(0))
            _judge(g, units, found, config, said, advice)
        if asks and isinstance(engine, NetworkEngine) and engine.loss in LOSSES.values() and engine.base_bytes <= LARGE:
            _beside_exact(engine, estimator, coords, estimate, said, advice)
    except DzhpcError as error:
        log.debug("no look at the first estimate: %s", error)
        return ""
    return f"first estimate: {', '.join(said)}" + (f"; {'; '.join(advice)}" if advice else "") if said else ""


def signal(g: np.ndarray, mu: float, loss: float, dtype: torch.dtype) -> float:
    """The median difference of CGE's estimate g [n], in units in the last place of the loss.

    A unit is one of ``dtype``; or of float32, where all differences are multiples of one and the loss is a float32 number.
    """
    differences = np.abs(g[g != 0]) * mu
    with np.errstate(all="ignore"):  # beyond float32
        rounded = np.float32(loss)
        single = float(np.spacing(np.abs(rounded)))
        unit = np.spacing(np.abs(np.float64(loss))) if dtype == torch.float64 else single
        multiples = differences / single
        whole = (np.abs(multiples - multiples.round()) < 1e-3) & (multiples > 0.5)
    if float(rounded) == loss and len(g) > 2 and whole.all():
        unit = single
    return float(np.median(differences) / max(float(unit), 1e-300))


def _judge(g: np.ndarray, units: float, asked: tuple, config: Config, said: list[str], advice: list[str]) -> None:
    """What the coordinates that were asked again, and for -mu, say of the estimate g [n]."""
    zo, optim, (positions, up, down) = config.zo, config.optim, asked
    slope, bend, central = (up - down) / 2, (up + down) / 2, zo.difference == "central"
    size, noise = np.abs(slope).sum(), np.abs((slope if central else up) - g[positions] * zo.mu).sum()
    share = np.abs(bend).sum() / size if size else 0.0
    if size:
        said.append(f"noise {noise / size:.1g} and curvature {share:.2g} of the slope")
    if units < FEW:
        more = f"{zo.mu * 10 * FEW / max(units, 1):.0e}"
        advice.append(f"raise zo.mu to {more}: differences of {units:.0f} units in the last place")
    elif share > CURVED and not central:
        less = f"{zo.mu * CURVED / 10 / share:.0e}"
        advice.append(f'lower zo.mu to {less}, or use zo.difference = "central": the slope changes within mu')
    if noise > 0.1 * size:
        advice.append("the loss is noisy: the same question has other answers")
    largest, most, less = float(bend.max(initial=0.0)), 2 * (1 + optim.momentum), ""
    if optim.nesterov:
        most, less = most / (1 + 2 * optim.momentum), " / (1 + 2 momentum)"
    second = 2 * largest / zo.mu**2  # derivative
    if optim.name == "sgd" and units >= FEW and largest > 3 * noise and optim.lr * second > most:
        advice.append(f"lower optim.lr below {most / second:.2g}: 2 (1 + momentum) / second derivative{less}")


def _beside_exact(
    engine: NetworkEngine, estimator: Estimator, coords: np.ndarray, estimate: torch.Tensor, said: list[str], advice: list[str]
) -> None:
    try:
        gradient = autograd(engine)
    except InputError:
        said.append("autograd knows no gradient")
        return
    exact = engine.index.flatten(gradient.values())[torch.from_numpy(coords).to(engine.index.device)]
    cosine = float(torch.cosine_similarity(exact.double(), estimate.double(), dim=0))
    said.append(f"cosine to the exact gradient {cosine:.3f}")
    if estimator.by_coordinate and cosine < ALIKE and exact.any():
        advice.append("change zo.mu: this is not the gradient")
