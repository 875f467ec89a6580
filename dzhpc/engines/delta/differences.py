"""f(x + d) - f(x) for each kind of function: exact, without linearisation, and without subtracting nearby numbers.

x: base value, d: its change; both broadcast against each other. Where a change is large (LARGE), nothing cancels, exponentials
may overflow, and f(x + d) - f(x) is evaluated as it stands.
"""

import math

import torch
from torch import Tensor

LARGE = 10.0  # exp(LARGE) is far from 1 and far from overflow


def expm1(d: Tensor) -> Tensor:
    """exp(d) - 1: in float32 by a series where d is small, since no compiler makes vectors of torch's."""
    if d.dtype == torch.float64:
        return torch.expm1(d)
    series = 0.0
    for n in range(8, 0, -1):
        series = series * d + 1 / math.factorial(n)
    return torch.where(d.abs() < 0.35, series * d, torch.exp(d) - 1)


def relu_difference(x: Tensor, d: Tensor) -> Tensor:
    """relu(x + d) - relu(x) without cancellation."""
    return torch.maximum(d + x.clamp(max=0), -x.clamp(min=0))


def sigmoid_difference(x: Tensor, d: Tensor) -> Tensor:
    """s(x) s(-x) e / (1 + s(x) e), e = expm1(d)."""
    s, e = torch.sigmoid(x), expm1(d.clamp(-LARGE, LARGE))
    return torch.where(d.abs() < LARGE, s * torch.sigmoid(-x) * e / (1 + s * e), torch.sigmoid(x + d) - s)


def tanh_difference(x: Tensor, d: Tensor) -> Tensor:
    """tanh(x) = 2 sigmoid(2x) - 1."""
    return 2 * sigmoid_difference(2 * x, 2 * d)


def silu_difference(x: Tensor, d: Tensor) -> Tensor:
    """x s(x): d s(x + d) + x [s(x + d) - s(x)]."""
    return d * torch.sigmoid(x + d) + x * sigmoid_difference(x, d)


FAR = 14.0  # where phi is zero in float32
ERFC = (0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368)
GAUSS = ((0.1127016653792583, 5 / 18), (0.5, 8 / 18), (0.8872983346207417, 5 / 18))  # nodes and weights on [0, 1]


def gelu_difference(x: Tensor, d: Tensor) -> Tensor:
    """x Phi(x): d Phi(x + d) + x int_x^{x+d} phi, by three Gauss points where d is small and by subtraction elsewhere."""
    small = d * sum(w * _density(x + t * d) for t, w in GAUSS)
    return d * _cdf(x + d) + x * torch.where(d.abs() < 0.25, small, _cdf(x + d) - _cdf(x))


def gelu_tables(x: Tensor) -> tuple[Tensor, Tensor]:
    """Phi(x) and phi(x), computed in float64: all that :func:`gelu_difference_by_tables` needs of a base value beside x."""
    return _cdf(x.double()).to(x.dtype), _density(x.double()).to(x.dtype)


def gelu_difference_by_tables(x: Tensor, cdf: Tensor, density: Tensor, d: Tensor) -> Tensor:
    """d Phi(x) + (x + d) [Phi(x + d) - Phi(x)], to float32's rounding and at a fifth of the cost.

    The bracket is phi(x) sum_n (-1)^n He_n(x) d^(n+1) / (n+1)! to n = 5 where d is small (He_n: Hermite polynomials).
    """
    t = x.clamp(-FAR, FAR)
    q = t * t
    hermite = (1.0, -t, q - 1, -t * (q - 3), (q - 6) * q + 3, -t * ((q - 10) * q + 15))
    series = 0.0
    for n in range(5, -1, -1):
        series = series * d + hermite[n] / math.factorial(n + 1)
    step = torch.where(d.abs() < 0.125, density * d * series, _rounded_cdf(x + d) - cdf)
    return d * (cdf + step) + x * step


def _cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _rounded_cdf(x: Tensor) -> Tensor:
    """Phi(x) to a relative error of 1.2e-7 (Press et al., Numerical Recipes, erfcc), four times as fast as by erfc."""
    z = x.abs() * math.sqrt(0.5)
    u = 1 / (1 + 0.5 * z)
    power = 0.0
    for c in (*ERFC, -1.26551223):
        power = power * u + c
    tail = 0.5 * u * torch.exp(power - z * z)
    return torch.where(x < 0, tail, 1 - tail)


def gelu_tanh_difference(x: Tensor, d: Tensor) -> Tensor:
    """x (1 + tanh u) / 2 with u = c (x + a x^3)."""
    a, c = 0.044715, math.sqrt(2 / math.pi)
    u, du = c * (x + a * x**3), c * (d + a * d * (3 * x * x + 3 * x * d + d * d))
    return 0.5 * (d * (1 + torch.tanh(u + du)) + x * tanh_difference(u, du))


def clamp_difference(x: Tensor, d: Tensor, low: float, high: float) -> Tensor:
    """clamp(x + d) - clamp(x)."""
    c = x.clamp(low, high)
    return torch.maximum(torch.minimum(d + (x - c), high - c), low - c)


def exp_difference(x: Tensor, d: Tensor) -> Tensor:
    """exp(x) expm1(d)."""
    small = torch.exp(x) * torch.expm1(d.clamp(-LARGE, LARGE))
    return torch.where(d.abs() < LARGE, small, torch.exp(x + d) - torch.exp(x))


def softmax_change(p: Tensor, d: Tensor, dim: int) -> Tensor:
    """p (e - r) / (1 + r), p the probabilities, e = expm1(d), r = sum p e; for rows of changes below LARGE."""
    e = expm1(d.clamp(-LARGE, LARGE))
    r = (p * e).sum(dim, keepdim=True)
    return p * (e - r) / (1 + r)


def statistics(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean, sqrt(variance + eps)) over ``dims``, kept as axes of length one."""
    centred = x - x.mean(dims, keepdim=True)
    return centred, ((centred * centred).mean(dims, keepdim=True) + eps).sqrt()


def coefficients(d: Tensor, centred: Tensor, s: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(mean D, 1/s', (s' - s)/(s s')) over ``dims``: all that a normalised change needs beside D itself.

    Two sums in one pass, of which :func:`coefficients_of_means` makes the rest.
    """
    return coefficients_of_means(_mean(d, dims), _mean(d * (centred + centred + d), dims), s)


def coefficients_of_means(mean_d: Tensor, crossed: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`coefficients`, from mean(D) and mean(D (2 x_c + D)); dv is the latter less (mean D)^2: x_c has mean zero."""
    dv = crossed - mean_d * mean_d
    s2 = (s * s + dv).sqrt()
    return mean_d, 1 / s2, dv / ((s2 + s) * s * s2)


def _mean(x: Tensor, dims: list[int]) -> Tensor:
    """The mean over ``dims``, the first of them last: of each image, then of the batch; rows in cache are summed up faster."""
    return (x.mean(dims[1:], keepdim=True) if len(dims) > 1 else x).mean(dims[:1], keepdim=True)


def normalised_change(d: Tensor, centred: Tensor, s: Tensor, dims: list[int]) -> Tensor:
    """Change of x_c / s, s^2 = mean(x_c^2) + eps over ``dims``: D_c/s' - x_c (s' - s)/(s s')."""
    mean_d, scale, shrink = coefficients(d, centred, s, dims)
    return (d - mean_d) * scale - centred * shrink


def log_mean_exp(log_p: Tensor, d: Tensor, dim: int) -> Tensor:
    """log sum_k p_k exp(d_k), sum p = 1: log1p(sum p expm1(d)); the axis stays, with length one.

    Given log p, for a p below the smallest number counts where its change is large.
    """
    small = torch.log1p((log_p.exp() * torch.expm1(d.clamp(-LARGE, LARGE))).sum(dim, keepdim=True))
    return torch.where(d.abs().amax(dim, keepdim=True) < LARGE, small, torch.logsumexp(log_p + d, dim, keepdim=True))


def log_softmax_change(log_p: Tensor, d: Tensor, dim: int) -> Tensor:
    """d - log sum p exp(d), p the base probabilities."""
    return d - log_mean_exp(log_p, d, dim)


def cross_entropy_difference(log_p: Tensor, d: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of log sum_k p_k exp(d_k - d_y); log p [B, K], d [P, B, K], targets [B] -> [P]."""
    own = d.gather(2, targets[None, :, None].expand(d.shape[0], -1, 1))
    return log_mean_exp(log_p, d - own, 2)[..., 0].mean(1)


def mse_difference(residual: Tensor, d: Tensor) -> Tensor:
    """Mean of d (2 r + d), r = outputs - targets [B, ...], d [P, B, ...] -> [P]."""
    return (d * (2 * residual + d)).flatten(1).mean(1)
