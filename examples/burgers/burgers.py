"""A coarse solver that is not fluid dynamics of ours: Burgers' equation u_t + u u_x = nu u_xx on a ring of length 1, in NumPy."""

import numpy as np

X, DT = 32, 0.01  # grid points and time step of the coarse solver
FACTOR = 8  # the reference has so many times more points, and FACTOR^2 times more steps
FRAMES = 60


def flux_step(u, nu, dt):
    """One explicit step of states [N, X]: Rusanov's flux, central diffusion. Its own numerical viscosity is |u| / 2X."""
    dx, right = 1 / u.shape[-1], np.roll(u, -1, -1)
    speed = np.maximum(abs(u), abs(right))
    flux = (u**2 + right**2) / 4 - speed * (right - u) / 2 - nu[:, None] * (right - u) / dx  # between a point and the next
    return u - dt / dx * (flux - np.roll(flux, 1, -1))


def step(states, parameters):
    """The black box: states [N, X] and viscosities [N] -> the states a time step later."""
    return flux_step(states, parameters, DT)


def reference(nu):
    """[FRAMES, X]: the fine solution from a fixed initial state, box means over FACTOR points."""
    x = (np.arange(X * FACTOR) + 0.5) / (X * FACTOR)
    u, frames = (np.sin(2 * np.pi * x) + 0.5 * np.cos(4 * np.pi * x))[None], []
    for _ in range(FRAMES):
        frames.append(u.reshape(X, FACTOR).mean(1))
        for _ in range(FACTOR**2):
            u = flux_step(u, np.array([nu]), DT / FACTOR**2)
    return np.stack(frames)
