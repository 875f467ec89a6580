"""Gradient estimators: pure functions over an engine with a bound batch. No MPI here.

CGE: g_j = [l(theta + mu e_j) - l(theta)] / mu for each coordinate j                                (eq. 1)
RGE: g = 1/q sum_i [l(theta + mu u_i) - l(theta)] / mu * u_i,  u_i ~ N(0, I), a function of (seed, i)  (eq. 1)

Chen et al., DeepZero, ICLR 2024 (arXiv 2310.02025).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dzhpc.errors import InputError
from dzhpc.method.coordinates import ParameterIndex
from dzhpc.method.seeds import generator

BLOCK = 64  # directions summed in one matrix product; fixed, since it decides the order of the sum


@dataclass
class Partial:
    """An estimate left unfinished: ``values`` [n] hold where ``done`` [n] (bool); n coordinates of S, or q directions."""

    values: np.ndarray
    done: np.ndarray


def step_queries(zo, n: int, bind_cost: int = 1, query_cost: int = 1) -> int:
    """What a step on n coordinates asks, ``zo`` being that section: ``bind_cost`` for the base, ``query_cost`` a perturbation."""
    sides = 2 if zo.difference == "central" else 1
    perturbations = {"cge": sides * n, "rge": sides * (zo.q or n)}.get(zo.estimator, 0)
    return bind_cost + perturbations * query_cost


def cge(engine, coords, mu: float, difference: str = "forward") -> Tensor:
    """Coordinate-wise estimate on ``coords`` (int64 [n]) -> [n] in the parameters' dtype.

    "forward" costs n queries and errs by mu/2 * H_jj; "central", [l(+mu) - l(-mu)] / 2 mu, costs 2n and errs by O(mu^2).
    """
    if difference == "central":
        return (engine.differences(coords, mu) - engine.differences(coords, -mu)) / (2 * mu)
    return engine.differences(coords, mu) / mu


def rge(engine, q: int, mu: float, seed: int, difference: str = "forward") -> dict[str, Tensor]:
    """Estimate from q Gaussian directions over all coordinates: name -> tensor; q queries ("central": 2q)."""
    if q < 1:
        raise InputError(f"q = {q}: expected at least one direction")
    coords = np.arange(engine.index.size)
    slopes = rge_slopes(engine, range(q), mu, seed, coords, difference)
    flat = torch.zeros(engine.index.size, dtype=engine.index.dtype, device=engine.index.device)
    flat[torch.from_numpy(coords).to(flat.device)] = rge_sum(slopes, seed, coords, engine.index)
    return engine.index.split(flat)


def rge_slopes(engine, indices, mu: float, seed: int, coords: np.ndarray, difference: str = "forward") -> Tensor:
    """[l(theta + mu u_i) - l(theta)] / mu for each direction index i -> [len(indices)]; u_i is zero outside ``coords``."""

    def directions() -> Iterator[Tensor]:
        where = torch.from_numpy(coords).to(engine.index.device)
        for i in indices:
            u = torch.zeros(engine.index.size, dtype=engine.index.dtype, device=engine.index.device)
            u[where] = direction(seed, i, len(coords), engine.index)
            yield u

    if difference == "central":
        return (engine.directional(directions(), mu) - engine.directional(directions(), -mu)) / (2 * mu)
    return engine.directional(directions(), mu) / mu


def rge_sum(slopes: Tensor, seed: int, coords: np.ndarray, index: ParameterIndex) -> Tensor:
    """1/q sum_i slopes_i u_i on ``coords`` [n]: the directions are computed anew, so only q scalars need to travel."""
    total = torch.zeros(len(coords), dtype=index.dtype, device=index.device)
    for start in range(0, len(slopes), BLOCK):
        part = slopes[start : start + BLOCK]
        total += part @ torch.stack([direction(seed, start + k, len(coords), index) for k in range(len(part))])
    return total / len(slopes)


def direction(seed: int, i: int, n: int, index: ParameterIndex) -> Tensor:
    """The i-th Gaussian direction [n]: a function of (seed, i), whoever computes it."""
    return torch.randn(n, generator=generator(seed, "direction", i), dtype=index.dtype).to(index.device)


def autograd(engine) -> dict[str, Tensor]:
    """The exact gradient of the bound loss by back-propagation (needs a white box): name -> tensor."""
    return dict(zip(engine.index.names, engine.gradient(), strict=True))
