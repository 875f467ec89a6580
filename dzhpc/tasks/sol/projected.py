"""The wake's step in torch: PhiFlow's geometry and edges, the pressure by fast sine transforms. Differentiable, CPU and GPU.

The pressure matrix A (p -> div(joined grad p), p = 0 outside) differs from the five-point Laplacian A0 of the empty rectangle in
the rows R of cells in or next to the rod only: A = A0 + E B, with E the columns R of the identity and B = (A - A0)[R].
Sine transforms S diagonalise A0, and by Sherman, Morrison and Woodbury

    p = A0^-1 (d - E K p0),  p0 = A0^-1 d on the box around the rod,  K = (I + B A0^-1 E)^-1 B  (capacitance matrix; Buzbee,
    Dorr, George and Golub 1971).

All of it is products of small dense matrices: 0.9 MFLOP a state of 32 x 64 cells, where a dense inverse takes 8.4.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dzhpc.errors import InputError
from dzhpc.tasks.sol.phiflow import masks
from dzhpc.tasks.sol.wake import DT, SPEED, Wake, unpack, viscosity

AT_ONCE = 2**17  # numbers in the states advanced together on a CPU: more would leave its cache


class Projected:
    """The step for states [N, 2, nx + 1, ny + 1] and parameters [N] -> next states, both of ``dtype``.

    diffusion (explicit) -> v = U on the boundary -> advection (semi-Lagrangian) -> projection with the rod as obstacle.
    Bits are a function of the states, the parameters and N alone. On a GPU autograd's are not (it adds up atomically).
    Raises InputError for a rod that covers no cell.
    """

    name, differentiable = "projected", True

    def __init__(self, wake: Wake, device: torch.device, dtype: torch.dtype = torch.float32):
        (nx, ny), self.queries = wake.cells, 0
        active, joined, solid = masks(wake)
        if active.all():
            raise InputError(f"task.radius = {wake.radius:g}: the rod covers no cell of {nx} x {ny}; raise radius or resolution")
        put = lambda array: torch.tensor(array, dtype=dtype, device=device)  # noqa: E731
        self._pressure = Pressure(wake, active, joined, put)
        self._by_dx, self._joined = put(active / wake.dx), put(-joined / wake.dx)
        inside = np.ones(wake.shape)
        inside[0, [0, -1]] = inside[1, :, [0, -1]] = 0  # PhiFlow's Laplacian is 0 on the outermost normal faces
        self._inside = put(inside * DT / wake.dx**2)
        held = np.zeros(wake.shape)
        held[1, :-1] = wake.boundary()
        self._free, self._held = put(1 - held), put(held * SPEED)
        exists = np.ones(wake.shape)
        exists[0, :, -1] = exists[1, -1] = 0
        self._open = put(exists * (1 - solid))
        # where a face lies, and how far U DT is, in the coordinates of grid_sample: (along, across), from -1 to 1
        size = np.array([ny, nx])[:, None, None]
        self._place = put(np.mgrid[: nx + 1, : ny + 1][::-1] * 2 / size - 1)
        self._reach = put(-2 * DT / wake.dx / size)
        self._at_once = max(1, AT_ONCE // int(np.prod(wake.shape))) if device.type == "cpu" else None

    def __call__(self, states: Tensor, parameters: Tensor) -> Tensor:
        nu = viscosity(parameters).to(states)
        self.queries += len(states)
        size = self._at_once or max(1, len(states))
        parts = [self._step(s, n) for s, n in zip(states.split(size), nu.split(size), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _step(self, states: Tensor, nu: Tensor) -> Tensor:
        return self.project(self.advect(self.hold(self.diffuse(states, nu))))

    def diffuse(self, states: Tensor, nu: Tensor) -> Tensor:
        """x + nu dt lap x, nu [N]; values beyond the edge equal those on it, outermost normal faces stay as they are."""
        states = filled(states)
        wide = F.pad(states, (1, 1, 1, 1), mode="replicate")
        lap = (wide[:, :, 2:, 1:-1] + wide[:, :, :-2, 1:-1]).add_(wide[:, :, 1:-1, 2:]).add_(wide[:, :, 1:-1, :-2])
        return torch.addcmul(states, lap.sub_(states, alpha=4), nu[:, None, None, None] * self._inside)

    def hold(self, states: Tensor) -> Tensor:
        """v = U at the inflow and the walls."""
        return torch.addcmul(self._held, states, self._free)

    def advect(self, states: Tensor) -> Tensor:
        """x(r - v(r) dt), bilinear; the other component of v at a face is the mean of its four neighbours."""
        states = filled(states)
        n, _, rows, columns = states.shape
        u, v = F.pad(states, (1, 1, 1, 1), mode="replicate").unbind(1)
        u, v = u[:, 1:-1] + u[:, 2:], v[:, :-2] + v[:, 1:-1]
        flow = states.new_empty(n, 2, 2, rows, columns)  # of u's and v's faces, the components along and across
        flow[:, 0, 0] = (v[..., 1:-1] + v[..., 2:]).mul_(0.25)
        flow[:, 0, 1] = states[:, 0]
        flow[:, 1, 0] = states[:, 1]
        flow[:, 1, 1] = (u[..., :-2] + u[..., 1:-1]).mul_(0.25)
        origin = torch.addcmul(self._place, flow, self._reach).view(2 * n, 2, rows, columns).permute(0, 2, 3, 1)
        states = states.view(2 * n, 1, rows, columns)
        return F.grid_sample(states, origin, padding_mode="border", align_corners=True).view(n, 2, rows, columns)

    def project(self, states: Tensor) -> Tensor:
        """The nearest states without divergence, and without flow through the rod's faces."""
        states = states * self._open
        p = F.pad(self._pressure.solve(self.divergences(states)), (1, 1, 1, 1))
        here = p[:, 1:, 1:]
        gradient = torch.stack((here - p[:, :-1, 1:], here - p[:, 1:, :-1]), 1)
        return torch.addcmul(states, gradient, self._joined)

    def divergences(self, states: Tensor) -> Tensor:
        """div v of the cells outside the rod, 0 in it [N, nx, ny]."""
        u, v = unpack(states)
        return ((u[:, 1:] - u[:, :-1]) + (v[..., 1:] - v[..., :-1])) * self._by_dx

    def divergence(self, states: Tensor) -> Tensor:
        """The largest |div v| over the cells outside the rod [N]."""
        return self.divergences(states).flatten(1).abs().amax(1)


class Pressure:
    """Solves A p = d, see above. ``matrix`` is A itself, sparse float64, its rows in the rod c p = d with any c."""

    def __init__(self, wake: Wake, active: np.ndarray, joined: np.ndarray, put):
        nx, ny = wake.cells
        self.matrix, empty = _matrix(wake, active, joined), _matrix(wake, np.ones_like(active), np.ones_like(joined))
        (sx, ex), (sy, ey) = _sines(nx), _sines(ny)
        values = (ex[:, None] + ey) / wake.dx**2  # eigenvalues of A0
        changed = np.unravel_index((self.matrix - empty).tocoo().col, wake.cells)
        i, j = (slice(x.min(), x.max() + 1) for x in changed)  # the box: columns of B, among them R
        box = np.ravel_multi_index(np.mgrid[i, j].reshape(2, -1), wake.cells)
        b = (self.matrix - empty)[box][:, box].toarray()
        inverse = np.einsum("ap,bp,cq,dq,pq->acbd", sx[i], sx[i], sy[j], sy[j], 1 / values, optimize=True)
        inverse = inverse.reshape(len(box), len(box))  # A0^-1 on the box
        self._capacitance = put(-np.linalg.solve(np.eye(len(box)) + b @ inverse, b).T)
        self._sx, self._sy, self._by_values = put(sx), put(sy), put(1 / values)
        self._sx_box, self._sy_box = put(sx[i]), put(sy[j])
        self._sx_box_t, self._sy_box_t = put(sx[i].T), put(sy[:, j])

    def solve(self, d: Tensor) -> Tensor:
        """p [N, nx, ny] from d [N, nx, ny]."""
        n, nx, ny = d.shape
        d = torch.matmul(self._sx, (d.reshape(-1, ny) @ self._sy).view(n, nx, ny))
        near = torch.matmul(self._sx_box, d * self._by_values) @ self._sy_box_t
        force = (near.flatten(1) @ self._capacitance).view_as(near)
        d = (d + torch.matmul(self._sx_box_t, force @ self._sy_box)) * self._by_values
        return (torch.matmul(self._sx, d).view(-1, ny) @ self._sy).view(n, nx, ny)


def filled(states: Tensor) -> Tensor:
    """A copy in which entries without a face repeat their neighbour, as values beyond an edge do."""
    states = states.clone()
    states[:, 0, :, -1] = states[:, 0, :, -2]
    states[:, 1, -1] = states[:, 1, -2]
    return states


def _sines(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(S, e): the second difference with zeros beyond both ends is S diag(e) S, S symmetric and orthogonal [n, n] (DST-I)."""
    k = np.arange(1, n + 1)
    return np.sqrt(2 / (n + 1)) * np.sin(np.pi * np.outer(k, k) / (n + 1)), 2 * np.cos(np.pi * k / (n + 1)) - 2


def _matrix(wake: Wake, active: np.ndarray, joined: np.ndarray):
    """p -> div(joined grad p), p = 0 outside; -4 p / dx^2 in cells that are not active. Sparse [nx ny, nx ny]."""
    from scipy import sparse

    nx, ny = wake.cells
    number = np.pad(np.arange(nx * ny).reshape(nx, ny), 1, constant_values=-1)
    here, diagonal, entries = number[1:-1, 1:-1], np.where(active, 0.0, -4.0), []
    u, v = joined[0, :, :-1], joined[1, :-1]
    for face, there in ((u[:-1], number[:-2, 1:-1]), (u[1:], number[2:, 1:-1]), (v[:, :-1], number[1:-1, :-2]),
                        (v[:, 1:], number[1:-1, 2:])):  # fmt: skip
        face = face * active
        diagonal -= face
        used = (there >= 0) & (face != 0)
        entries.append((face[used], here[used], there[used]))
    entries.append((diagonal.ravel(), here.ravel(), here.ravel()))
    value, row, column = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    return sparse.csr_array((value / wake.dx**2, (row, column)), (nx * ny, nx * ny))
