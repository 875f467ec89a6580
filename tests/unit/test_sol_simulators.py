"""Coarse solvers: the fast one against PhiFlow and exact solutions, its linear solve, its gradient; the user's own."""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import spsolve

from dzhpc.config import SolKeys
from dzhpc.engines import blackbox
from dzhpc.errors import BlackBoxError, InputError
from dzhpc.tasks.sol import phiflow, simulators
from dzhpc.tasks.sol.phiflow import PhiFlow
from dzhpc.tasks.sol.projected import AT_ONCE, Projected
from dzhpc.tasks.sol.reference import Reference, Trajectories
from dzhpc.tasks.sol.simulators import make_simulator
from dzhpc.tasks.sol.solvers import OwnSolver, Simulation
from dzhpc.tasks.sol.wake import DT, Wake, pack, unpack, viscosity

CPU, WAKE = torch.device("cpu"), Wake()
RE = torch.tensor([160e3, 905e3, 5120e3], dtype=torch.float64)


def advanced(simulator, states, parameters, steps):
    for _ in range(steps):
        states = simulator(states, parameters)
    return states


@pytest.fixture(scope="module")
def fast():
    return Projected(WAKE, CPU)


@pytest.fixture(scope="module")
def exact():
    return Projected(WAKE, CPU, torch.float64)


@pytest.fixture(scope="module")
def developed(fast):
    """Three states with large vortices, 50 steps after they were stirred in; this coarse a wake sheds none by itself."""
    rough = torch.nn.functional.interpolate(torch.randn(3, 1, 6, 12), (33, 65), mode="bicubic", align_corners=True)[:, 0]
    stirred = pack(rough[..., 1:] - rough[..., :-1], rough[:, :-1] - rough[:, 1:])
    return advanced(fast, WAKE.initial() + 2 * stirred, RE, 50)


def some_states(dtype=torch.float64, count=4):
    u, v = torch.randn(count, 33, 64, dtype=dtype), 1 + torch.randn(count, 32, 65, dtype=dtype)
    return pack(u, v)


def test_the_fast_solver_is_phiflow_after_a_hundred_steps(fast, developed):
    start = torch.cat([WAKE.initial().repeat(3, 1, 1, 1), developed])
    ours, theirs = (advanced(simulator, start, RE.repeat(2), 100) for simulator in (fast, PhiFlow(WAKE, CPU)))
    assert float((ours - start).abs().amax((1, 2, 3)).min()) > 0.5  # something has happened in each
    assert float((ours - theirs).abs().max()) < 1e-4


def test_precision_float32_loses_little(fast, exact, developed):
    found, truth = (advanced(s, developed.to(t), RE, 100) for s, t in ((fast, torch.float32), (exact, torch.float64)))
    assert float((found - truth).abs().max()) < 2e-5


@pytest.mark.parametrize("component", [0, 1])
def test_a_mode_decays_as_diffusion_lets_it(component):
    """u along the flow, v across it, away from the edges: the scheme's own factor; exp(-nu k^2 t) in second order."""
    nu, steps, missed = 0.005, 8, []
    for resolution in (32, 64):
        wake = Wake(resolution, 10)
        solver, (nx, ny) = Projected(wake, CPU, torch.float64), wake.cells
        cells = ny if component == 0 else nx
        k = 6 * np.pi / (200 if component == 0 else 100)
        mode = torch.from_numpy(np.cos(k * wake.dx * (np.arange(cells) + 0.5)))
        u = mode.expand(1, nx + 1, ny) if component == 0 else torch.zeros(1, nx + 1, ny, dtype=mode.dtype)
        v = mode[:, None].expand(1, nx, ny + 1) if component == 1 else torch.zeros(1, nx, ny + 1, dtype=mode.dtype)
        states = start = pack(u, v)
        for _ in range(steps):
            states = solver.diffuse(states, torch.tensor([nu], dtype=torch.float64))
        inner = (0, component, slice(steps + 1, nx - steps - 1), slice(steps + 1, ny - steps - 1))
        factor = 1 + nu * DT * (2 * np.cos(k * wake.dx) - 2) / wake.dx**2
        torch.testing.assert_close(states[inner], start[inner] * factor**steps, rtol=0, atol=1e-13)
        missed.append(-np.log(factor) / (nu * k**2 * DT) - 1)
    assert abs(missed[0]) < 0.03
    assert 3.8 < missed[0] / missed[1] < 4.3


def test_a_uniform_flow_carries_a_profile_with_it(exact):
    """By one cell a step exactly; by any distance if the profile is linear, which bilinear interpolation reproduces."""
    profile = torch.randn(64, dtype=torch.float64)
    states = pack(profile.expand(1, 33, 64), torch.full((1, 32, 65), WAKE.dx / DT, dtype=torch.float64))
    for _ in range(10):
        states = exact.advect(states)
    u, v = unpack(states)
    torch.testing.assert_close(u[0, :, 10:], profile[:-10].expand(33, 54), rtol=0, atol=1e-11)
    torch.testing.assert_close(v, torch.full_like(v, WAKE.dx / DT), rtol=0, atol=1e-12)
    x = torch.arange(32, dtype=torch.float64)[:, None] * WAKE.dx
    states = pack(torch.full((1, 33, 64), 0.7, dtype=torch.float64), (0.1 * x + 2).expand(1, 32, 65))
    _, v = unpack(exact.advect(states))
    torch.testing.assert_close(v[0, 1:], (0.1 * (x[1:] - 0.7 * DT) + 2).expand(31, 65), rtol=0, atol=1e-12)


def test_what_flows_in_at_the_edge_is_what_was_there(exact):
    """No ghost values: against the edge the first face's value is carried in."""
    u = torch.zeros(1, 33, 64, dtype=torch.float64)
    v = torch.full((1, 32, 65), 0.5 * WAKE.dx / DT, dtype=torch.float64)
    v[..., 0] = 3 * WAKE.dx / DT
    _, moved = unpack(exact.advect(pack(u, v)))
    torch.testing.assert_close(moved[..., 0], v[..., 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("wake", "tolerance"), [(WAKE, 1e-12), (Wake(16, 17.3), 1e-12), (Wake(48, 5), 1e-12)])
def test_the_pressure_solves_the_sparse_system(wake, tolerance):
    pressure = Projected(wake, CPU, torch.float64)._pressure
    active = torch.from_numpy(phiflow.masks(wake)[0])
    d = torch.randn(3, *wake.cells, dtype=torch.float64) * active
    p = pressure.solve(d)
    matrix = pressure.matrix.tocsc()
    truth = torch.from_numpy(spsolve(matrix, d.flatten(1).numpy().T).T).view_as(p)
    assert float((p - truth).abs().max() / truth.abs().max()) < tolerance
    residual = torch.from_numpy((matrix @ p.flatten(1).numpy().T).T).view_as(d) - d
    assert float(residual.abs().max() / d.abs().max()) < tolerance
    assert 0 < int((active == 0).sum()) < active.numel() / 4


def test_projected_states_have_no_divergence(fast, exact, developed):
    for solver, states, tolerance in ((exact, some_states(), 1e-12), (fast, some_states(torch.float32), 2e-5)):
        assert float(solver.divergence(states).min()) > 0.5
        assert float(solver.divergence(solver.project(states)).max()) < tolerance
    assert float(fast.divergence(developed).max()) < 2e-6  # in use: PhiFlow's own tolerance is 1e-5


def test_nothing_flows_inside_the_rod_and_the_pressure_does_not_act_on_its_rim(exact):
    """PhiFlow's rim faces keep the share of their flow that the rod leaves free: at most 22 % here, not nothing."""
    active, joined, solid = map(torch.from_numpy, phiflow.masks(WAKE))
    exists = torch.ones(WAKE.shape, dtype=torch.bool)
    exists[0, :, -1] = exists[1, -1] = False
    rod = (joined == 0) & exists
    states = some_states()
    new = exact.project(states)
    assert float((new - states * (1 - solid))[:, rod].abs().max()) < 1e-15
    u, v = unpack(solid)
    inner = u[1:-1][(active[1:] + active[:-1]) == 0], v[:, 1:-1][(active[:, 1:] + active[:, :-1]) == 0]
    assert [x.tolist() for x in inner] == [[1.0] * 26] * 2
    assert float((1 - solid)[rod].max()) < 0.22
    assert float(new[:, ~exists].abs().max()) == 0
    assert float((new - states)[:, ~rod & exists].abs().mean()) > 0.1


def test_a_coarse_state_of_one_without_divergence_has_none_either(exact):
    """Averages over faces keep the flow through them. The curl of a stream function has no divergence."""
    fine, stream = Wake(128), torch.randn(1, 129, 257, dtype=torch.float64)
    states = pack(stream[..., 1:] - stream[..., :-1], stream[:, :-1] - stream[:, 1:])
    coarse = fine.down(states, 4)
    assert coarse.shape == (1, *WAKE.shape)
    assert float(exact.divergence(coarse).max()) < 1e-14
    assert float(exact.divergence(coarse.flip(3)).max()) > 0.1


def test_the_gradient_by_autograd_is_that_of_finite_differences(exact, developed):
    states, weights = developed.double(), torch.randn(3, *WAKE.shape, dtype=torch.float64)
    direction = pack(torch.randn(3, 33, 64).double(), torch.randn(3, 32, 65).double())

    def value(states):
        return (weights * advanced(exact, states, RE, 3)).sum((1, 2, 3))

    variable = states.clone().requires_grad_()
    gradient = torch.autograd.grad(value(variable).sum(), variable)[0]
    found = (gradient * direction).sum((1, 2, 3))
    difference = (value(states + 1e-7 * direction) - value(states - 1e-7 * direction)) / 2e-7
    torch.testing.assert_close(found, difference, rtol=1e-5, atol=1e-5)
    assert float(found.abs().min()) > 0.1


def test_the_same_bits_again_and_the_same_numbers_in_any_batch(fast, developed):
    pieces = AT_ONCE // developed[0].numel()
    many, parameters = developed.repeat(pieces, 1, 1, 1), RE.repeat(pieces)
    assert len(many) > 2 * pieces  # more than are advanced at once
    found = fast(many, parameters)
    assert torch.equal(found, fast(many.clone(), parameters))
    alone = torch.cat([fast(developed[k : k + 1], RE[k : k + 1]) for k in range(3)])
    assert float((found[-3:] - alone).abs().max()) < 2e-6


@pytest.mark.parametrize("make", [lambda: Projected(WAKE, CPU), lambda: PhiFlow(WAKE, CPU)])
def test_a_state_that_is_lost_is_not_finite_and_takes_no_other_with_it(make, developed):
    simulator = make()
    expected = simulator(developed, RE)
    spoilt = developed.clone()
    spoilt[1, 1, 20, 30] = torch.nan
    found = simulator(spoilt, RE)
    assert not torch.isfinite(found[1]).all()
    assert float((found - expected)[[0, 2]].abs().max()) < 1e-5
    assert simulator.queries == 6


def test_a_pressure_that_does_not_converge_is_marked(monkeypatch, developed):
    monkeypatch.setattr(phiflow, "TOLERANCE", 1e-9)  # beyond float32
    found = PhiFlow(WAKE, CPU)(developed, RE)
    where = torch.ones_like(found, dtype=torch.bool)
    assert bool(found[where].isnan().all())


def test_without_phiflow_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "phi", None)
    monkeypatch.setitem(sys.modules, "phi.math", None)
    monkeypatch.delitem(sys.modules, "dzhpc.tasks.sol.phiflow")
    with pytest.raises(InputError, match=r"pip install 'dzhpc\[sol\]'"):
        importlib.import_module("dzhpc.tasks.sol.phiflow")


def own(function, monkeypatch, **keys):
    """A simulator from ``task.simulator``, its module made on the spot."""
    module = type(sys)("own_simulator")
    module.step = function
    monkeypatch.setitem(sys.modules, "own_simulator", module)
    return make_simulator(SolKeys(simulator="own_simulator:step", **keys), None, CPU)


def test_the_users_function_is_given_arrays_in_few_calls_and_counted(monkeypatch):
    given = []

    def step(states, parameters):
        given.append((type(states), states.dtype, states.shape, parameters.dtype, parameters.shape))
        states *= parameters[:, None]  # its own copy
        return states

    simulator, states = own(step, monkeypatch, batch_limit=3), torch.ones(7, 5)
    found = simulator(states, torch.arange(7.0))
    assert found.dtype == torch.float32
    assert found.tolist() == [[float(k)] * 5 for k in range(7)]
    assert float(states.sum()) == 35
    assert given == [(np.ndarray, np.float32, (n, 5), np.float64, (n,)) for n in (3, 3, 1)]
    assert (simulator.queries, simulator.differentiable) == (7, False)


def test_the_users_function_may_diverge_but_not_change_shape(monkeypatch):
    found = own(lambda s, p: s * np.array([np.nan, np.inf, 1])[:, None], monkeypatch)(torch.ones(3, 2), torch.ones(3))
    assert found.isfinite().tolist() == [[False] * 2, [False] * 2, [True] * 2]
    simulator = own(lambda s, p: s[:, :-1], monkeypatch)
    with pytest.raises(InputError, match=r"own_simulator:step gave \[3, 1\] for states \[3, 2\]"):
        simulator(torch.ones(3, 2), torch.ones(3))
    with pytest.raises(InputError, match=r"gave \[2, 2\] for states \[3, 2\]"):
        own(lambda s, p: s[1:], monkeypatch)(torch.ones(3, 2), torch.ones(3))


def test_states_that_are_no_real_numbers_are_refused(monkeypatch):
    with pytest.raises(InputError, match="own_simulator:step gave complex numbers; expected real ones"):
        own(lambda s, p: s * np.exp(0.3j), monkeypatch)(torch.ones(3, 2), torch.ones(3))
    states = np.ones((4, 3))
    for given, message in ((states * 1j, "complex numbers"), (np.ma.masked_array(states, states > 0), "a masked array")):
        monkeypatch.setitem(sys.modules, "own_reference", SimpleNamespace(whole=lambda p, given=given: given))
        keys = SolKeys(simulator="own_simulator:step", reference="own_reference:whole", warm_up=1, frames=3)
        with pytest.raises(InputError, match=f"task.reference = own_reference:whole gave {message}"):
            next(OwnSolver(keys).advance(Simulation(1.0)))


def test_the_users_function_is_asked_again_where_it_raises(monkeypatch):
    waits, failures = [], [1, 1]
    monkeypatch.setattr(blackbox.time, "sleep", waits.append)

    def step(states, parameters):
        if failures:
            failures.pop()
            raise ConnectionError("busy")
        return states + 1

    assert float(own(step, monkeypatch, retries=2)(torch.zeros(2, 3), torch.ones(2)).sum()) == 6
    assert waits == [1, 2]
    failures += [1, 1]
    with pytest.raises(BlackBoxError, match=r"own_simulator:step: ConnectionError: busy"):
        own(step, monkeypatch, retries=1)(torch.zeros(2, 3), torch.ones(2))


def test_a_reference_of_another_grid_or_rod_is_refused():
    def reference(wake):
        split = Trajectories(torch.zeros(1, 2, *wake.shape), torch.ones(1))
        return Reference(split, split, split, True, {"radius": wake.radius})

    assert make_simulator(SolKeys(), reference(WAKE), CPU).name == "projected"
    with pytest.raises(InputError, match=r"task.resolution = 32 has states \[2, 33, 65\], the reference \[2, 17, 33\]"):
        make_simulator(SolKeys(), reference(Wake(16)), CPU)
    with pytest.raises(InputError, match=r"task.radius = 10, the reference was made with 5"):
        make_simulator(SolKeys(simulator="phiflow"), reference(Wake(32, 5)), CPU)
    assert float(viscosity(RE)[0]) == 0.0625
    assert simulators.make_wake("phiflow", WAKE, CPU).name == "phiflow"
