"""Randomized smoothing: bounds against exact binomial sums, radii against closed forms, adaptive sampling against both."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dzhpc.errors import InputError
from dzhpc.tasks.defense.smoothing import (
    ABSTAIN,
    Certificate,
    Plan,
    Smoothed,
    certified_radius,
    confidence_interval,
    lower_confidence_bound,
    noise,
    predict,
    upper_confidence_bound,
)

SIGMA, ALPHA = 0.25, 0.001
GRID = [*np.linspace(0.001, 0.999, 200), 0.5, 0.9, 1e-6, 1 - 1e-6, 1.0]


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.4])
@pytest.mark.parametrize("n", [1, 2, 10, 137, 1000])
def test_the_lower_bound_covers_p_with_at_least_1_minus_alpha(n, alpha):
    """Exactly: P[bound <= p] = sum of Bin(k; n, p) over the k whose bound lies at or below p."""
    bounds = np.array([lower_confidence_bound(k, n, alpha) for k in range(n + 1)])
    assert (np.diff(bounds) > 0).all()
    at_bounds = [p for b in bounds[1:] for p in (np.nextafter(b, 0), b)]  # where coverage is worst: just below a bound
    for p in (*GRID, *at_bounds[:: max(1, len(at_bounds) // 100)]):
        covered = stats.binom.pmf(np.arange(n + 1), n, p)[bounds <= p].sum()
        assert covered >= 1 - alpha - 1e-12


def test_the_lower_bound_in_closed_form():
    assert [lower_confidence_bound(0, n, ALPHA) for n in (1, 100, 10_000)] == [0.0] * 3
    for n in (1, 100, 10_000):
        assert lower_confidence_bound(n, n, ALPHA) == pytest.approx(ALPHA ** (1 / n), rel=1e-12)
        assert upper_confidence_bound(0, n, ALPHA) == pytest.approx(1 - ALPHA ** (1 / n), rel=1e-12)
        assert upper_confidence_bound(n, n, ALPHA) == 1.0
    for k, n in ((1, 7), (70, 100), (8522, 10_000)):
        p = lower_confidence_bound(k, n, ALPHA)
        assert stats.binom.sf(k - 1, n, p) == pytest.approx(ALPHA, rel=1e-9)  # its definition
        assert upper_confidence_bound(n - k, n, ALPHA) == pytest.approx(1 - p, rel=1e-12)
    low, high = confidence_interval(91, 200)
    assert (low, high) == pytest.approx(tuple(stats.binomtest(91, 200).proportion_ci(method="exact")), rel=1e-9)


def test_known_counts():
    """The bound of 8,522 in 10,000 lies just below Phi(1); 8,527 is the first count that reaches the radius sigma."""
    assert certified_radius(8522, 10_000, SIGMA, ALPHA) == pytest.approx(0.249589, abs=1e-6)
    assert certified_radius(8522, 10_000, SIGMA, ALPHA) < 0.25
    first = next(k for k in range(8000, 10_001) if (certified_radius(k, 10_000, SIGMA, ALPHA) or 0) >= 0.25)
    assert stats.binom.sf(first - 1, 10_000, stats.norm.cdf(1)) <= ALPHA < stats.binom.sf(first - 2, 10_000, stats.norm.cdf(1))
    assert certified_radius(10_000, 10_000, SIGMA, ALPHA) == pytest.approx(SIGMA * stats.norm.ppf(ALPHA**1e-4), rel=1e-12)
    assert certified_radius(0, 100, SIGMA, ALPHA) is None
    assert certified_radius(50, 100, SIGMA, ALPHA) is None
    assert certified_radius(1, 1, SIGMA, 0.5) is None  # the bound is 1/2 exactly


@pytest.mark.parametrize("n_a, n, alpha", [(-1, 10, 0.1), (11, 10, 0.1), (0, 0, 0.1), (5, 10, 0.0), (5, 10, 1.0)])
def test_impossible_counts_are_named(n_a, n, alpha):
    with pytest.raises(InputError, match=r"expected (0 <= n_a <= n|a probability)"):
        lower_confidence_bound(n_a, n, alpha)
    with pytest.raises(InputError, match="sigma = 0"):
        certified_radius(5, 10, 0.0, 0.1)


def test_predict_abstains_from_a_close_race():
    assert predict(np.array([3, 60, 40]), 0.001) == ABSTAIN
    assert predict(np.array([3, 80, 20]), 0.001) == 1
    assert stats.binomtest(80, 100).pvalue < 0.001 < stats.binomtest(60, 100).pvalue
    assert predict(np.array([50, 50]), 0.001) == ABSTAIN


def test_noise_is_a_function_of_seed_image_and_sample():
    shape = (3, 4, 5)
    whole = noise(7, "estimation", 12, range(130), shape)
    parts = [noise(7, "estimation", 12, range(a, b), shape) for a, b in ((0, 1), (1, 20), (20, 57), (57, 130))]
    assert torch.equal(torch.cat(parts), whole)
    for other in (noise(8, "estimation", 12, range(130), shape), noise(7, "selection", 12, range(130), shape),
                  noise(7, "estimation", 13, range(130), shape)):  # fmt: skip
        assert abs(torch.corrcoef(torch.stack([whole.flatten(), other.flatten()]))[0, 1]) < 0.05
    assert float(whole.mean()) == pytest.approx(0, abs=0.05)
    assert float(whole.std()) == pytest.approx(1, abs=0.05)


def linear(margin: float, shape=(1, 4, 4)):
    """A linear classifier of two classes, and an image whose l2 distance to the border is ``margin``."""
    w = torch.randn(math.prod(shape), dtype=torch.float64)
    image = torch.rand(shape)
    b = margin * float(w.norm()) - float(w @ image.flatten().double())

    def classify(images):
        return ((images.flatten(1).double() @ w + b) < 0).long()

    return classify, image


def certify(classify, image, plan, batch=100, idx=0, seed=0, label=0):
    state = Certificate(idx, label)
    asked = sum(Smoothed(classify, 2, plan.sigma, seed, batch).certify(image, state, plan))
    assert state.done
    assert asked == plan.n0 + state.n
    return state


@pytest.mark.parametrize("margin", [0.05, 0.2, 0.35])
def test_the_radius_of_a_linear_classifier_is_its_margin(margin):
    """g is constant exactly up to the border, and p = Phi(margin / sigma): the certified radius converges to it from below."""
    classify, image = linear(margin)
    gaps = []
    for n in (100, 1000, 10_000, 100_000):
        state = certify(classify, image, Plan.fixed(SIGMA, 100, n, ALPHA), batch=10_000)
        assert state.selected == 0
        assert state.n == n
        assert state.radius is None or state.radius <= margin
        gaps.append(margin - (state.radius or 0.0))
    p = stats.norm.cdf(margin / SIGMA)
    slope = SIGMA / stats.norm.pdf(margin / SIGMA)  # dR/dp
    expected = slope * stats.norm.ppf(1 - ALPHA) * math.sqrt(p * (1 - p) / 100_000)
    assert gaps[0] > gaps[1] > gaps[3]
    assert 0 < gaps[3] < 2.5 * expected < 0.02


def test_the_other_side_of_the_border_gets_the_other_class():
    classify, image = linear(-0.3)
    state = certify(classify, image, Plan.fixed(SIGMA, 100, 1000, ALPHA))
    assert (state.predict, state.correct) == (1, False)
    assert 0.2 < state.radius <= 0.3
    classify, image = linear(0.0)
    state = certify(classify, image, Plan.fixed(SIGMA, 100, 1000, ALPHA))
    assert (state.predict, state.radius, state.correct) == (ABSTAIN, None, False)


def test_counts_depend_on_neither_batch_nor_interruption():
    classify, image = linear(0.1)
    plan = Plan.adaptive(SIGMA, 70, 1000, ALPHA)
    whole = certify(classify, image, plan, batch=1000, idx=5)
    for batch in (64, 100):
        state, asked = Certificate(5, 0), 0
        while not state.done:  # a new process for every batch
            smoothed = Smoothed(classify, 2, SIGMA, 0, batch)
            asked += next(smoothed.certify(image, state, plan), 0)
        assert state == whole
        assert asked == 70 + state.n
    assert certify(classify, image, plan, idx=6).n_a != whole.n_a


def outcomes(plan: Plan, p: float) -> dict[tuple[int, int], float]:
    """(n_a, n) at which adaptive sampling ends -> its probability, exactly: binomial increments between looks."""
    weight, before, found = np.ones(1), 0, {}
    for look in plan.looks:
        weight = np.convolve(weight, stats.binom.pmf(np.arange(look - before + 1), look - before, p))
        before = look
        for n_a in np.flatnonzero(weight > 1e-18):
            if plan.decided(int(n_a), look):
                found[int(n_a), look], weight[n_a] = weight[n_a], 0.0
    return found


@pytest.mark.parametrize("alpha", [0.001, 0.1])
def test_adaptive_sampling_covers_p_and_saves(alpha):
    """The whole procedure with its looks: P[certified radius > sigma Phi^-1(p)] <= alpha, for every p, and what it costs."""
    plan = Plan.adaptive(SIGMA, 100, 1000, alpha)
    assert plan.looks[0] == 100
    assert plan.looks[-1] == 1000
    assert sum(plan.alphas) == pytest.approx(alpha)
    samples = {}
    for p in (0.3, 0.5, 0.51, 0.6, 0.75, 0.8413, 0.9, 0.97, 0.9772, 0.99, 1.0):
        found = outcomes(plan, p)
        assert sum(found.values()) == pytest.approx(1)
        border = SIGMA * stats.norm.ppf(p)
        wrong = sum(w for (n_a, n), w in found.items() if (plan.radius(n_a, n) or 0.0) > max(border, 0.0))
        assert wrong <= alpha
        samples[p] = sum(w * n for (_, n), w in found.items())
    assert samples[0.3] < 120
    assert samples[0.75] < 700
    assert samples[1.0] < 700


@pytest.mark.parametrize("margin", [-0.3, 0.1, 0.3, 2.0])
def test_adaptive_sampling_certifies_the_same_radii_of_the_grid(margin):
    classify, image = linear(margin)
    fixed = certify(classify, image, Plan.fixed(SIGMA, 100, 3000, ALPHA), batch=1000)
    early = certify(classify, image, Plan.adaptive(SIGMA, 100, 3000, ALPHA), batch=1000)
    assert early.n < 0.8 * fixed.n
    assert early.predict == fixed.predict
    assert math.floor(early.radius / 0.25) == math.floor(fixed.radius / 0.25)


def test_a_plan_too_short_for_a_look_is_the_fixed_one():
    assert Plan.adaptive(SIGMA, 100, 100, ALPHA) == Plan.fixed(SIGMA, 100, 100, ALPHA)
