"""Gauss-Newton on the active coordinates S, from the columns of the Jacobian that CGE's queries are (Levenberg 1944; Marquardt
1963; Schraudolph 2002).

With A [n, M] the columns R J e_j of the coordinates j of S (:mod:`dzhpc.engines.curvature`) as rows, and g [n] their slopes,

    H = A A^T        delta = -(H + lambda D)^-1 g        D = 1, or mean(diag H), or diag H + EPS mean(diag H) (Marquardt)

Where M < n, (A A^T + lambda)^-1 g = [g - A (A^T A + lambda)^-1 A^T g] / lambda is a smaller system. No MPI here.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dzhpc.errors import NumericalError
from dzhpc.method.estimators import central
from dzhpc.method.seeds import generator

EPS = 0.01  # Marquardt: of the mean curvature, for coordinates that have none
PARTS = 16  # of the rows M, whose products are summed one after the other: fixed, since it decides bits
TILE = 128  # rows of H that are multiplied at once
HARDER = 4.0  # times as large is lambda after a step that was rejected
TRIES = 8  # dampings tried in a step, at most
SMALLEST = 1e-10  # of the loss: a step that should lower it by less is not tried
LEAST = 1e-6  # of the mean curvature: where a trust region's damping begins if lambda is less
LOWEST = 1e-12  # of the mean curvature: lambda that is adapted is no less, so that it is soon large again


def columns(engine, coords: np.ndarray, mu: float, difference: str, sketch: "Sketch | None" = None) -> Tensor:
    """[n, 2 + M]: of each coordinate its slope, |A_j|^2 = H_jj, and A_j, or the sketch of it. n queries ("central": 2n)."""
    curvature = engine.curvature

    def ask(mu: float) -> Tensor:
        changes = engine.responses(coords, mu)
        return torch.cat([curvature.slopes(changes)[:, None], curvature.roots(changes)], 1)

    found = central(engine, ask, mu) if difference == "central" else ask(mu) / mu
    slopes, roots = found[:, :1], found[:, 1:]
    squares = roots.square().sum(1, dtype=torch.float64).to(roots.dtype)
    return torch.cat([slopes, squares[:, None], roots if sketch is None else sketch(roots)], 1)


class Sketch:
    """Rows m, m + size, m + 2 size, ... of A^T, with random signs, become one: E[sketch(A) sketch(A)^T] = A A^T.

    rows: M. size: of the sketch. Its signs are a function of (seed, step).
    """

    def __init__(self, rows: int, size: int, seed: int, step: int):
        self._size = size
        signs = torch.randint(0, 2, (rows,), generator=generator(seed, "sketch", step), dtype=torch.int8)
        self._signs = 2 * signs - 1

    def __call__(self, roots: Tensor) -> Tensor:
        """[P, M] -> [P, size]; each row by itself and in one order, whatever P is."""
        out = torch.zeros(len(roots), self._size, dtype=roots.dtype, device=roots.device)
        signs = self._signs.to(roots)
        for start in range(0, roots.shape[1], self._size):
            piece = roots[:, start : start + self._size]
            out[:, : piece.shape[1]] += piece * signs[start : start + self._size]
        return out


def parts(rows: int) -> list[slice]:
    """The rows 0 .. M - 1 of A^T in PARTS nearly equal pieces, whoever multiplies them."""
    edges = np.linspace(0, rows, min(PARTS, rows) + 1).astype(int).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def gram(block: Tensor) -> Tensor:
    """block block^T in float64, multiplied in its own type [n, n]: what lies below the diagonal, and that mirrored."""
    out = torch.empty(len(block), len(block), dtype=torch.float64)
    for start in range(0, len(block), TILE):
        rows, end = slice(start, start + TILE), start + TILE
        out[rows, :end] = block[rows] @ block[:end].T
        out[:start, rows] = out[rows, :start].T
    return out


@dataclass
class System:
    """(H + lambda D) delta = -g for any lambda. hessian: H [n, n] float64; or rows: A [n, M], M < n. gradient: g [n] float64.

    damping: "absolute", "relative" or "marquardt". diagonal: of H [n].
    """

    gradient: Tensor
    diagonal: Tensor
    damping: str
    hessian: Tensor | None = None
    rows: Tensor | None = None

    @property
    def metric(self) -> Tensor:
        """D [n]."""
        mean = self.diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny)
        if self.damping == "marquardt":
            return self.diagonal + EPS * mean
        return torch.ones_like(self.diagonal) * (1 if self.damping == "absolute" else mean)

    @property
    def scale(self) -> float:
        """The mean curvature in the metric: what lambda compares with."""
        return float((self.diagonal / self.metric).mean())

    def solve(self, damping: float) -> Tensor:
        """delta [n] float64. Without damping that of least norm, where H is singular."""
        scale = self.metric.rsqrt()
        g = self.gradient * scale
        if self.hessian is not None:
            return -scale * _Inverse(self.hessian * scale * scale[:, None], damping).times(g)
        a = self.rows.double() * scale[:, None]
        inner, ag = a.T @ a, a.T @ g
        if damping > 0:
            return -scale * (g - a @ _Inverse(inner, damping).times(ag)) / damping
        inverse = _Inverse(inner, 0.0)
        return -scale * (a @ inverse.times(inverse.times(ag)))

    def predicted(self, delta: Tensor, lr: float) -> float:
        """What lr delta changes the loss by, to second order."""
        return float(lr * (self.gradient @ delta)) + 0.5 * (lr * self.change(delta)) ** 2

    def change(self, delta: Tensor) -> float:
        """sqrt(delta^T H delta): what the outputs change by in the metric of the loss, to first order."""
        if self.hessian is not None:
            return float((delta @ (self.hessian @ delta)).clamp_min(0).sqrt())
        return float((self.rows.double().T @ delta).norm())

    def within(self, damping: float, trust: float | None) -> Tensor:
        """delta with ``change(delta) <= trust``: by more damping, then exactly by its length."""
        delta = self.solve(damping)
        if trust is None:
            return delta
        damping = max(damping, LEAST * self.scale)
        for _ in range(60):
            if self.change(delta) <= 2 * trust:
                break
            damping *= HARDER
            delta = self.solve(damping)
        return delta * min(1.0, trust / max(self.change(delta), 1e-300))


def next_damping(damping: float, change: float, predicted: float) -> float:
    """lambda after a step that changed the loss so, by how far the prediction was right (Marquardt 1963; Fletcher 1971)."""
    if not change < 0:
        return damping * HARDER
    ratio = change / predicted if predicted < 0 else 0.0
    return damping / 9 if ratio > 0.75 else damping if ratio > 0.25 else damping * 2


class _Inverse:
    """(matrix + damping)^-1 as something to multiply vectors with; without damping the pseudo-inverse."""

    def __init__(self, matrix: Tensor, damping: float):
        if not torch.isfinite(matrix).all():
            raise NumericalError("the Gauss-Newton matrix is not finite: raise optim.damping, or lower optim.lr or zo.mu")
        self._factor = None
        if damping > 0:
            damped = matrix.clone()
            damped.diagonal().add_(damping)
            factor, info = torch.linalg.cholesky_ex(damped)
            if int(info) == 0:
                self._factor = factor
                return
        values, self._vectors = torch.linalg.eigh(matrix)
        values = values.clamp_min(0) + damping
        cutoff = len(matrix) * torch.finfo(torch.float64).eps * values[-1]
        self._values = torch.where(values > cutoff, 1 / values, 0)

    def times(self, vector: Tensor) -> Tensor:
        """(matrix + damping)^-1 vector."""
        if self._factor is not None:
            return torch.cholesky_solve(vector[:, None], self._factor)[:, 0]
        return self._vectors @ (self._values * (self._vectors.T @ vector))


def averaged(before: dict[str, Tensor], coords: np.ndarray, now: dict[str, Tensor], keep: dict[str, float]) -> dict[str, Tensor]:
    """``keep * before + (1 - keep) * now`` for "hessian" and "gradient", as long as S stays; a new S begins anew.

    A mixture of an old matrix on the coordinates that two sets share, and a new one elsewhere, need not be positive.
    """
    same = "coordinates" in before and torch.equal(before["coordinates"], torch.from_numpy(coords))
    kept = {name for name in now if same and keep[name] > 0}
    mixed = {name: keep[name] * before[name] + (1 - keep[name]) * value for name, value in now.items() if name in kept}
    return {**now, **mixed, "coordinates": torch.from_numpy(coords)}
