"""PhiFlow's own step of the wake, a black box (Holl et al. 2020). The only module that imports phi: imported where it is needed.

Raises InputError on import where PhiFlow is not installed.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from dzhpc.errors import InputError
from dzhpc.tasks.sol.wake import DT, LENGTH, SPEED, Wake, pack, unpack, viscosity

try:
    from phi.math import NUMPY, extrapolation
    from phi.torch import flow
except ImportError as error:
    raise InputError(f"PhiFlow cannot be imported ({error}); install it with `pip install 'dzhpc[sol]'`") from None

TOLERANCE = 1e-5  # of the pressure, relative and absolute; in float32 1e-6 does not converge
SLACK = 10  # times the tolerance: a residual that is larger was not rounding


class PhiFlow:
    """The step for states [N, 2, nx + 1, ny + 1] float32 and parameters [N] -> next states; compiled once for every N.

    diffusion (explicit) -> v = U on the boundary -> advection (semi-Lagrangian) -> projection with the rod as obstacle (CG).

    A state whose pressure did not converge becomes NaN; compiled, PhiFlow would return it unmarked. The last bits of a state may
    depend on those that it is batched with, since CG goes on until all have converged.
    """

    name, differentiable = "phiflow", False

    def __init__(self, wake: Wake, device: torch.device):
        self.queries = 0
        self._grid, self._rod = _grid(wake), _rod(wake)
        flow.TORCH.set_default_device("GPU" if device.type == "cuda" else "CPU")
        held = pack(torch.zeros(1, wake.cells[0] + 1, wake.cells[1]), torch.from_numpy(wake.boundary()[None]).float())
        self._held = self._faces(*(_values(faces[0], "x,y") for faces in unpack(held)))
        self._active = _values(masks(wake)[0].astype(np.float32), "x,y")
        self._step = flow.math.jit_compile(self._advance)

    @torch.no_grad()
    def __call__(self, states: Tensor, parameters: Tensor) -> Tensor:
        """One step."""
        given = [*(faces.float().contiguous() for faces in unpack(states)), viscosity(parameters).float()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PhiML compiles by functions that torch is about to replace
            u, v, converged = self._step(*(_values(x, "x,y" if x.ndim > 1 else "", "states") for x in given))
        self.queries += len(states)
        new = pack(u.native("states,x,y"), v.native("states,x,y"))
        new[~converged.native("states")] = torch.nan
        return new.to(states.dtype)

    def _advance(self, u, v, nu):
        velocity = flow.diffuse.explicit(self._faces(u, v), nu, DT, correct_skew=False)
        velocity = velocity * (1 - self._held) + self._held * SPEED
        velocity = flow.advect.semi_lagrangian(velocity, velocity, DT)
        before = self._divergence(flow.fluid.apply_boundary_conditions(velocity, self._rod))
        velocity, _ = flow.fluid.make_incompressible(velocity, self._rod, flow.Solve("auto", TOLERANCE, TOLERANCE))
        after, limit = self._divergence(velocity), SLACK * TOLERANCE * flow.math.maximum(before, 1)
        return velocity.vector["x"].values, velocity.vector["y"].values, after <= limit

    def _divergence(self, velocity):
        """Its norm over the cells outside the rod; after the projection the residual of the pressure, which CG compares."""
        return flow.math.vec_length(flow.field.divergence(velocity).values * self._active, flow.spatial)

    def _faces(self, u, v):
        components = flow.math.stack({"x": u, "y": v}, flow.dual("vector"))
        return flow.StaggeredGrid(components, extrapolation.BOUNDARY, **self._grid)


def masks(wake: Wake) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """PhiFlow's geometry of the rod: (active [nx, ny], joined, solid [2, nx + 1, ny + 1]) float64.

    active: 1 for cells with a pressure, 0 in the rod. joined: 1 for faces through which the pressure acts, 0 at and in the rod.
    solid: the share of a face's surroundings that the rod takes. Both are 0 where there is no face.
    """
    with NUMPY:
        velocity = flow.StaggeredGrid(0.0, extrapolation.BOUNDARY, **_grid(wake))
        rod = _rod(wake).geometry
        free = flow.Field(velocity.geometry, ~flow.union([rod]), extrapolation.ONE)
        joined = flow.field.stagger(
            free, flow.math.minimum, velocity.boundary, at=velocity.sampled_at, dims=velocity.vector.item_names
        )
        solid = flow.resample(rod, velocity, soft=True, balance=1)
        return free.values.numpy("x,y").astype(np.float64), _packed(joined), _packed(solid)


def _grid(wake: Wake) -> dict[str, object]:
    nx, ny = wake.cells
    return {"x": nx, "y": ny, "bounds": flow.Box(x=LENGTH, y=2 * LENGTH)}


def _rod(wake: Wake) -> "flow.Obstacle":
    return flow.Obstacle(flow.Sphere(x=LENGTH / 2, y=LENGTH / 2, radius=wake.radius))


def _values(array: Tensor | np.ndarray, space: str, *batch: str):
    """An array with its axes named."""
    return flow.wrap(array, *map(flow.batch, batch), *([flow.spatial(space)] if space else []))


def _packed(field) -> np.ndarray:
    values = field.values if isinstance(field, flow.Field) else field
    u, v = (torch.from_numpy(np.array(values[{"~vector": name}].numpy("x,y"), np.float64)) for name in "xy")
    return pack(u[None], v[None])[0].numpy()
