"""A loss known by its values: fit the damped oscillator x'' = -k x - c x', x(0) = x0, x'(0) = v0, to a noisy record of x(t)."""

import numpy as np
from scipy.integrate import solve_ivp

TRUE = np.array([4.0, 0.3, 1.0, 0.5])  # stiffness k and damping c per unit mass, position x0 and velocity v0 at t = 0
TIMES = np.linspace(0, 8, 161)
NOISE = 0.02


def record(theta):
    """x at TIMES, by an adaptive Runge-Kutta method; its tolerance lies far below mu, so that differences are smooth."""
    k, c, x0, v0 = theta
    motion = solve_ivp(lambda t, y: (y[1], -k * y[0] - c * y[1]), (0, 8), (x0, v0), "DOP853", TIMES, rtol=1e-9, atol=1e-9)
    return motion.y[0]


class Oscillator:
    """The misfit to the record at each time; its loss is the mean of the squares."""

    def __init__(self):
        self.data = record(TRUE) + NOISE * np.random.default_rng(0).standard_normal(len(TIMES))

    def initial(self):
        return np.array([3.0, 0.6, 0.5, 0.0])

    def residuals(self, thetas, step):
        return np.array([record(theta) - self.data for theta in thetas])
