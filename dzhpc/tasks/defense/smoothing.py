"""Randomized smoothing: what a classifier f answers under Gaussian noise, and the radius within which that cannot change.

g(x) = argmax_c P[f(x + delta) = c], delta ~ N(0, sigma^2 I). Where one class has a probability of at least p > 1/2, g is
constant within the l2 distance R = sigma Phi^-1(p) of x. Cohen, Rosenfeld, Kolter, ICML 2019, Theorem 1 and Section 3.2.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dzhpc.errors import InputError
from dzhpc.method.seeds import generator

ABSTAIN = -1  # in the place of a class
BLOCK = 20  # samples of noise drawn from one generator
FIRST_LOOK, GROWTH = 100, 1.5  # adaptive sampling looks after so many samples, then whenever they are so many times more
GIVE_UP = 0.01  # adaptive sampling: the risk, at each look, of missing a radius that more samples might have certified


def lower_confidence_bound(n_a: int, n: int, alpha: float) -> float:
    """The one-sided Clopper-Pearson bound on a binomial p, of which ``n_a`` successes in ``n`` trials were seen.

    The p at which P[Bin(n, p) >= n_a] = alpha; 0 for n_a = 0. It exceeds the true p with a probability of at most alpha.
    Raises InputError unless 0 <= n_a <= n, n >= 1 and 0 < alpha < 1.
    """
    _check(n_a, n, alpha)
    return 0.0 if n_a == 0 else float(_stats().beta.ppf(alpha, n_a, n - n_a + 1))


def upper_confidence_bound(n_a: int, n: int, alpha: float) -> float:
    """The bound from above: falls below the true p with a probability of at most alpha. Raises as the lower one."""
    _check(n_a, n, alpha)
    return 1.0 if n_a == n else float(_stats().beta.ppf(1 - alpha, n_a + 1, n - n_a))


def certified_radius(n_a: int, n: int, sigma: float, alpha: float) -> float | None:
    """sigma Phi^-1(p), p the lower bound: the l2 radius, in units of the pixels, within which g is constant.

    None (abstain) unless p > 1/2. Wrong with a probability of at most alpha. Raises InputError for arguments out of range.
    """
    if not (sigma > 0 and math.isfinite(sigma)):
        raise InputError(f"sigma = {sigma}: expected a positive number, the noise's standard deviation for pixels in [0, 1]")
    p = lower_confidence_bound(n_a, n, alpha)
    return sigma * float(_stats().norm.ppf(p)) if p > 0.5 else None


def confidence_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The two-sided Clopper-Pearson interval of a fraction of which k in n were seen."""
    alpha = (1 - level) / 2
    return lower_confidence_bound(k, n, alpha), upper_confidence_bound(k, n, alpha)


def predict(counts: np.ndarray, alpha: float) -> int:
    """PREDICT: the most frequent class of counts [classes], or ABSTAIN.

    It is g(x) but with a probability of at most alpha: a two-sided binomial test between the two most frequent classes.
    """
    second, first = np.argsort(counts, kind="stable")[-2:] if len(counts) > 1 else (0, 0)
    top, other = int(counts[first]), int(counts[second]) if len(counts) > 1 else 0
    if top + other == 0:
        raise InputError("predict: no samples were counted")
    return int(first) if _stats().binomtest(top, top + other, 0.5).pvalue <= alpha else ABSTAIN


def _stats():
    """scipy.stats: a second to import, which each rank of every verb would pay, and only those need who certify."""
    from scipy import stats

    return stats


def _check(n_a: int, n: int, alpha: float) -> None:
    if not (n >= 1 and 0 <= n_a <= n):
        raise InputError(f"n_a = {n_a}, n = {n}: expected 0 <= n_a <= n and at least one sample")
    if not 0 < alpha < 1:
        raise InputError(f"alpha = {alpha}: expected a probability between 0 and 1, such as 0.001")


@dataclass(frozen=True)
class Plan:
    """How many noisy copies of an image are asked for: n0 to choose the class, then up to ``looks[-1]`` to bound its probability.

    After each of ``looks`` samples the bound is taken, at that look's share of alpha. The shares add up to alpha, so whichever
    look is the last one, and for whatever reason, the bound is wrong with a probability of at most alpha (union bound).
    """

    sigma: float
    n0: int
    looks: tuple[int, ...]
    alphas: tuple[float, ...]
    grid: float = 0.25  # adaptive: the radii 0, grid, 2 grid, ... decide

    @classmethod
    def fixed(cls, sigma: float, n0: int, n: int, alpha: float) -> "Plan":
        """Cohen's: one look."""
        return cls(sigma, n0, (n,), (alpha,))

    @classmethod
    def adaptive(cls, sigma: float, n0: int, n: int, alpha: float, grid: float = 0.25) -> "Plan":
        """Looks after FIRST_LOOK samples, GROWTH times as many, ..., n. The last has half of alpha, the others share the rest."""
        looks, look = [], FIRST_LOOK
        while look < n:
            looks.append(look)
            look = math.ceil(GROWTH * look)
        if not looks:
            return cls.fixed(sigma, n0, n, alpha)
        return cls(sigma, n0, (*looks, n), (*[alpha / 2 / len(looks)] * len(looks), alpha / 2), grid)

    def radius(self, n_a: int, n: int) -> float | None:
        """The certified radius at a look, None to abstain."""
        return certified_radius(n_a, n, self.sigma, self.alphas[self.looks.index(n)])

    def decided(self, n_a: int, n: int) -> bool:
        """Whether more samples are not worth while at a look: the next radius of the grid is out of reach, or this is the last.

        Out of reach: the upper bound lies below what that radius needs, or it would not be certified if every later sample were
        a success. Giving up too early costs a certificate, never its truth.
        """
        last = self.looks[-1]
        if n == last:
            return True
        radius = self.radius(n_a, n)
        steps = 0 if radius is None else math.floor(radius / self.grid) + 1
        needed = float(_stats().norm.cdf(steps * self.grid / self.sigma))
        best = lower_confidence_bound(n_a + last - n, last, self.alphas[-1])
        return best < needed or upper_confidence_bound(n_a, n, GIVE_UP) < needed


@dataclass
class Certificate:
    """What is known of one image: ``n_a`` of ``n`` noisy copies were taken for class ``selected``."""

    idx: int  # of the image in the test set
    label: int
    selected: int = ABSTAIN  # by the first n0 copies; ABSTAIN before
    n_a: int = 0
    n: int = 0
    radius: float | None = None
    seconds: float = 0.0
    done: bool = False

    @property
    def predict(self) -> int:
        """The certified class, or ABSTAIN."""
        return ABSTAIN if self.radius is None else self.selected

    @property
    def correct(self) -> bool:
        return self.predict == self.label


def noise(seed: int, purpose: str, image: int, samples: range, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 [len(samples), *shape]: a function of (seed, purpose, image, sample), however these are grouped."""
    first, last = samples.start // BLOCK, (samples.stop - 1) // BLOCK
    blocks = [torch.randn(BLOCK, *shape, generator=generator(seed, purpose, image, k)) for k in range(first, last + 1)]
    start = samples.start - first * BLOCK
    return torch.cat(blocks)[start : start + len(samples)]


class Smoothed:
    """The smoothed classifier g of ``classify(images float32 [N, C, H, W]) -> classes int64 [N]``.

    Its answers are functions of (seed, image index, sample index). All calls for an image have the same shapes whoever makes
    them: sums of a network may depend on the shape, so counts must not depend on how the images are shared out.
    """

    def __init__(self, classify: Callable[[Tensor], Tensor], classes: int, sigma: float, seed: int, batch: int):
        self._classify, self._classes, self._sigma, self._seed, self._batch = classify, classes, sigma, seed, batch

    def counts(self, image: Tensor, idx: int, purpose: str, samples: range) -> np.ndarray:
        """How often each class was answered, int64 [classes], for ``samples`` noisy copies of image [C, H, W] in one call."""
        delta = noise(self._seed, purpose, idx, samples, tuple(image.shape)).to(image.device)
        answers = self._classify(image + self._sigma * delta)
        return np.bincount(answers.cpu().numpy(), minlength=self._classes)

    def certify(self, image: Tensor, state: Certificate, plan: Plan) -> Iterator[int]:
        """CERTIFY, a batch at a time: brings ``state`` further and yields the samples asked for.

        The caller may stop in between, and go on with the same state later, in another process: the certificate is the same.
        """
        if state.selected == ABSTAIN:
            counts = sum(self.counts(image, state.idx, "selection", part) for part in _cut(0, plan.n0, self._batch))
            state.selected = int(np.argmax(counts))
            yield plan.n0
        for look in plan.looks:
            for part in _cut(state.n, look, self._batch):
                state.n_a += int(self.counts(image, state.idx, "estimation", part)[state.selected])
                state.n = part.stop
                yield len(part)
            if state.n == look and plan.decided(state.n_a, state.n):
                break
        state.radius, state.done = plan.radius(state.n_a, state.n), True


def _cut(start: int, stop: int, size: int) -> list[range]:
    return [range(k, min(k + size, stop)) for k in range(start, stop, size)]
