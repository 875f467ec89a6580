"""Solver in the loop: correction, unrolled loss, its engines, divergence, windows, evaluation, first-order steps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dzhpc
from dzhpc import config
from dzhpc.errors import InputError, NumericalError
from dzhpc.files.checkpoint import State, save_checkpoint
from dzhpc.method import estimators
from dzhpc.method.coordinates import ParameterIndex
from dzhpc.method.first_order import PARTS
from dzhpc.models import zoo
from dzhpc.models.corrector import Corrector, NarrowConv2d
from dzhpc.models.identity import model_sha256
from dzhpc.tasks import make_task
from dzhpc.tasks.sol import reference
from dzhpc.tasks.sol.correction import Correction
from dzhpc.tasks.sol.loss import DIVERGED, Windows
from dzhpc.tasks.sol.projected import Projected
from dzhpc.tasks.sol.reference import Reference, Trajectories
from dzhpc.tasks.sol.rollout import rollout
from dzhpc.tasks.sol.unrolled import Unrolled, UnrolledDelta
from dzhpc.tasks.sol.wake import Wake, pack
from dzhpc.training.forecast import Forecast

CPU = torch.device("cpu")
MODULE = """
import numpy as np
from torch import nn

ASKED = []


def ring(states, parameters):
    ASKED.append(len(states))
    return 0.9 * states + parameters[:, None, None] * np.roll(states, 1, -1)


def slow_ring(states, parameters):
    return ring(states, parameters) / 4


class Wrong(nn.Conv2d):
    def __init__(self, channels, widths):
        super().__init__(channels + 1, channels + 1, 3, padding=1)
"""


def stirred(wake, count):
    """States with large vortices: this coarse a wake sheds none by itself."""
    nx, ny = wake.cells
    rough = F.interpolate(torch.randn(count, 1, 6, 12), (nx + 1, ny + 1), mode="bicubic", align_corners=True)[:, 0]
    return wake.initial() + 2 * pack(rough[..., 1:] - rough[..., :-1], rough[:, :-1] - rough[:, 1:])


@torch.no_grad()
def trajectories(resolution, parameters, frames, warm_up=40):
    """Of a solver twice as fine."""
    parameters = torch.tensor(parameters, dtype=torch.float64)
    wake, kept = Wake(2 * resolution), []
    solver, states = Projected(wake, CPU), stirred(wake, len(parameters))
    for step in range(warm_up + frames):
        if step >= warm_up:
            kept.append(wake.down(states, 2))
        states = solver(states, parameters)
    return Trajectories(torch.stack(kept, 1), parameters)


def reference_of(resolution, frames=12):
    return Reference(
        trajectories(resolution, [160e3, 640e3, 2560e3], frames), trajectories(resolution, [905e3, 320e3], frames),
        trajectories(resolution, [480e3], frames), True,
        {"staggered": True, "resolution": resolution, "factor": 2, "radius": 10.0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def small():
    """Reference on 8 x 16 cells."""
    torch.manual_seed(0)
    return reference_of(8)


@pytest.fixture(scope="module")
def usual():
    """Reference on 32 x 64 cells."""
    torch.manual_seed(0)
    return reference_of(32)


def randomised(model, size=0.05):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(size * torch.randn(p.shape))
    return model


def windows_of(reference, unroll, dtype, count=3):
    train = reference.train
    states = torch.stack([train.states[k % 3, k : k + unroll + 1] for k in range(count)]).to(dtype)
    return Windows(states, train.parameters[[k % 3 for k in range(count)]], [f"window {k}" for k in range(count)])


def in_the_loop(reference, unroll, dtype=torch.float64, widths=(4, 3), size=0.05, count=3):
    """(engine full, engine delta), both bound, a correction that does something."""
    wake = Wake(reference.shape[1] - 1)
    model = randomised(Corrector(widths=widths).to(dtype), size).to(memory_format=torch.channels_last)
    correction, simulator = Correction(model, reference), Projected(wake, CPU, dtype)
    engines = Unrolled(correction, simulator, unroll), UnrolledDelta(correction, simulator, unroll, count)
    losses = [engine.bind(windows_of(reference, unroll, dtype, count)) for engine in engines]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    return engines


# the network and what it corrects


@pytest.mark.parametrize(("widths", "size"), [((32, 64), 56_898), ((8,), 1_010), ((4,), 506)])
def test_the_corrector_has_the_papers_number_of_parameters(widths, size):
    assert sum(p.numel() for p in Corrector(widths=widths).parameters()) == size


@pytest.mark.parametrize("cells", [(32, 64), (8, 16), (1, 48), (5, 7), (6, 9)])
@pytest.mark.parametrize("outputs", [1, 2, 3, 5, 8, 32])
def test_a_convolution_with_few_outputs_is_torchs(outputs, cells):
    conv = NarrowConv2d(3, outputs, (5, 3)).double()
    x = torch.randn(2, 3, *cells, dtype=torch.float64)
    assert torch.allclose(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=(2, 1)), rtol=1e-12, atol=1e-12)


def test_a_corrector_without_training_corrects_nothing(small):
    correction = Correction(Corrector(widths=(4,)), small)
    states = small.train.states[:, 3]
    assert torch.equal(correction(states, small.train.parameters), states)


def test_a_correction_of_faces_is_what_the_formula_says(small):
    model = randomised(Corrector(widths=(4,)).double())
    states, parameters = small.train.states[:, 3].double(), small.train.parameters
    found = Correction(model, small)(states, parameters)
    train, where = small.train.states.double(), small.where()
    sigma = [train[:, :, c][..., where[c]].abs().std(correction=0) for c in (0, 1)]
    seen = [states[:, c, :-1, :-1] / sigma[c] for c in (0, 1)]
    seen.append((parameters / parameters.std(correction=0))[:, None, None].expand_as(seen[0]))
    outputs = model(torch.stack(seen, 1))
    for c in (0, 1):
        expected = states[:, c].clone()
        expected[:, :-1, :-1] += sigma[c] * outputs[:, c]
        torch.testing.assert_close(found[:, c], expected, rtol=1e-12, atol=1e-12)
    assert (found[:, :, -1] == states[:, :, -1]).all()
    assert not found[:, ~where].any()


@pytest.mark.parametrize(("shape", "seen"), [((6,), (1, 1, 6)), ((3, 6), (3, 1, 6)), ((3, 4, 6), (3, 4, 6))])
def test_a_users_states_are_corrected_whole(shape, seen):
    train = Trajectories(torch.randn(2, 5, *shape), torch.tensor([1.0, 3.0]))
    reference = Reference(train, train, train, False, {})
    model = randomised(Corrector(seen[0], (4,), dims=2 if len(shape) == 3 else 1))
    states = torch.randn(7, *shape)
    sigma = reference.scales().float()[:, None, None]
    inputs = torch.cat([states.view(7, *seen) / sigma, torch.full((7, 1, *seen[1:]), 3.0)], 1)
    expected = states + (sigma * model(inputs)).view(7, *shape)
    torch.testing.assert_close(Correction(model, reference)(states, torch.full((7,), 3.0)), expected)


def test_a_model_of_another_shape_is_refused(small):
    with pytest.raises(
        InputError, match=r"Conv2d gives \[2, 2, 6, 14\] for inputs \[2, 3, 8, 16\]; expected \[2, 2, 8, 16\], the numbers"
    ):
        Correction(nn.Conv2d(3, 2, 3), small)


# the loss and its gradient


def test_the_loss_is_that_of_the_formula(small):
    full, delta = in_the_loop(small, 3)
    windows, sigma = windows_of(small, 3, torch.float64), small.scales().tolist()
    total = 0.0
    for b in range(3):
        state, re = windows.states[b, :1], windows.parameters[b : b + 1]
        for i in range(3):
            state = full.loss.correction(full.loss.simulator(state, re), re)
            for c in (0, 1):
                for error in (state[0, c] - windows.states[b, i + 1, c])[small.where()[c]].tolist():
                    total += 0.5 * (error / sigma[c]) ** 2 / 3
    assert full.bind(windows) == pytest.approx(total, rel=1e-9)
    assert delta.bind(windows) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("unroll", [1, 2, 4])
def test_the_engines_agree(small, unroll):
    full, delta = in_the_loop(small, unroll)
    draw, index = np.random.default_rng(unroll), full.index
    coords = np.concatenate([draw.permutation(index.range(name))[:40] for name in index.names])
    coords = draw.permutation(coords)
    expected, found = full.differences(coords, 1e-3), delta.differences(coords, 1e-3)
    assert (expected.abs() > 1e-7).float().mean() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-11)
    assert delta.queries == full.queries == 1 + len(coords)


def test_responses_are_columns_of_the_states_and_differences_their_reduction(small):
    full, delta = in_the_loop(small, 3)
    coords = np.arange(0, full.index.size, 5)
    exact, errors = delta.index.flatten(delta.gradient())[torch.from_numpy(coords)], []
    for mu in (1e-3, 1e-4):
        moved = delta.responses(coords, mu)
        assert moved.shape == (len(coords), 3, 3, *small.shape)
        torch.testing.assert_close(moved, full.responses(coords, mu), rtol=1e-6, atol=1e-11)
        slopes, roots = delta.curvature.slopes(moved), delta.curvature.roots(moved)
        torch.testing.assert_close(slopes + roots.square().sum(1) / 2, delta.differences(coords, mu))  # quadratic in the states
        errors.append(float((slopes / mu - exact).norm() / exact.norm()))
    assert errors[1] < min(5e-3, errors[0] / 2)  # of the order of mu, but for kinks: ReLU, upwind cells
    assert full.queries == 1 + 2 * len(coords) and delta.queries == 1 + 4 * len(coords)


def test_single_precision_loses_no_digits(usual):
    values = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(1)
        delta = in_the_loop(usual, 4, dtype, widths=(8,), size=0.02)[1]
        values.append(delta.differences(np.arange(0, 1010, 11), 1e-3).double())
    exact, rounded = values
    assert torch.linalg.vector_norm(rounded - exact) < 1e-3 * torch.linalg.vector_norm(exact)


def test_the_query_gradient_is_that_of_autograd_through_the_simulator(usual):
    delta = in_the_loop(usual, 8, torch.float32, widths=(8,), size=0.02)[1]
    coords = np.random.default_rng(3).permutation(delta.index.size)[:200]
    exact = delta.index.flatten(delta.gradient())[torch.from_numpy(coords)]
    estimate = dzhpc.cge(delta, coords, 1e-3)
    assert torch.cosine_similarity(estimate, exact, dim=0) > 0.999
    assert torch.linalg.vector_norm(estimate) / torch.linalg.vector_norm(exact) == pytest.approx(1, abs=0.02)


def test_what_changes_nothing_has_no_gradient_at_all(usual):
    """Behind a last layer of zeros, whose own weights have one; Adam would make a step of rounding errors."""
    model = Corrector(widths=(8,)).to(memory_format=torch.channels_last)
    delta = UnrolledDelta(Correction(model, usual), Projected(Wake(), CPU), 4, 3)
    delta.bind(windows_of(usual, 4, torch.float32))
    first, last = delta.index.range("layers.0.weight"), delta.index.range("layers.2.weight")
    assert not delta.differences(first[::9], 1e-3).any()
    assert delta.differences(last[::9], 1e-3).all()


def test_directions_are_differences_of_the_same_loss(small):
    full, delta = in_the_loop(small, 2)
    unit = torch.eye(full.index.size, dtype=torch.float64)[[3, 200]]
    torch.testing.assert_close(delta.directional(unit, 1e-3), delta.differences([3, 200], 1e-3), rtol=1e-6, atol=1e-12)
    assert delta.queries == 5


def test_the_simulator_is_asked_for_its_first_step_once(small):
    for engine in in_the_loop(small, 4):
        engine.loss.simulator.queries = 0
        engine.bind(windows_of(small, 4, torch.float64))
        engine.differences(np.arange(5), 1e-3)
        assert engine.loss.simulator.queries == 3 * 4 + 5 * 3 * 3


def test_chunks_fit_into_the_memory_or_not_one_does(small):
    _, delta = in_the_loop(small, 1)
    make = lambda mb: UnrolledDelta(delta.loss.correction, delta.loss.simulator, 1, 3, mb)  # noqa: E731
    each = 3 * 3 * 8 * 4 * 8 * 16 / 2**20  # copies, windows, bytes, channels, cells
    coords = np.arange(delta.index.size)
    assert max(map(len, make(5.5 * each).cut(coords))) == 5
    assert {len({*delta.index.owner(coords[chunk])}) for chunk in delta.cut(coords)} == {1}
    with pytest.raises(InputError, match=r"zo.memory_mb = 0.01: one coordinate needs 0.0\d? MiB at this batch size"):
        make(0.01)


# divergence


class Cliff:
    """A solver of states [N, 2, X] that blows up where the mean of a channel is just above an edge, for parameter 1."""

    name, differentiable = "cliff", False

    def __init__(self, channel, edge, beyond):
        self.channel, self.edge, self.beyond = channel, edge, beyond

    def __call__(self, states, parameters):
        assert states.isfinite().all()
        assert states.abs().max() < 1e3
        above = states[:, self.channel].mean(1) - self.edge
        over = (above > 0) & (above < 0.05) & (parameters == 1)
        return torch.where(over[:, None, None], torch.as_tensor(self.beyond, dtype=states.dtype), 0.9 * states)


@pytest.fixture
def cliff():
    """(engine of a kind over a cliff, mean of each channel after the first step, in the window that may fall; the windows)."""
    train = Trajectories(3 + torch.randn(2, 4, 2, 6).double(), torch.tensor([1.0, 2.0]).double())
    reference = Reference(train, train, train, False, {})
    model = randomised(Corrector(2, (3,), dims=1).double())
    windows = Windows(train.states.clone(), train.parameters, ["first", "second"])
    correction = Correction(model, reference)

    def make(kind, channel=0, edge=np.inf, beyond=0.0):
        simulator = Cliff(channel, edge, beyond)
        engine = Unrolled(correction, simulator, 3) if kind == "full" else UnrolledDelta(correction, simulator, 3, 2)
        engine.bind(windows)
        return engine

    first = correction(0.9 * windows.states[:1, 0], windows.parameters[:1])[0]
    return make, first.mean(1).tolist(), windows


@pytest.mark.parametrize("beyond", [np.nan, np.inf, -1e30, 1e3])
@pytest.mark.parametrize("kind", ["full", "delta"])
def test_a_diverging_query_is_left_out_and_named_and_spoils_no_other(cliff, kind, beyond, caplog):
    make, means, windows = cliff
    smooth, steep, coords, mu = make(kind), make(kind, 0, means[0] + 1e-3, beyond), np.arange(80), 0.01
    assert smooth.index.size == 80
    falls = []
    for j in coords:  # which do: the mean of channel 0 after the first step, with that coordinate really moved
        _, element = smooth.index.element(j)
        saved = element.clone()
        element += mu
        first = smooth.loss.correction(0.9 * windows.states[:1, 0], windows.parameters[:1])
        falls.append(bool(first[0, 0].mean() > means[0] + 1e-3))
        element.copy_(saved)
    assert 0 < sum(falls) < 40
    found, expected = steep.differences(coords, mu), smooth.differences(coords, mu)
    assert not found[falls].any()
    torch.testing.assert_close(found[~np.array(falls)], expected[~np.array(falls)], rtol=1e-9, atol=1e-12)
    assert expected[falls].abs().min() > 0
    assert steep.diverged == sum(falls)
    name = steep.index.describe(int(np.flatnonzero(falls)[0]))
    said = f"{name} diverges when perturbed (first, unrolled step 2): it stays out of this step"
    assert [record.getMessage() for record in caplog.records] == [said]
    steep.bind(windows)
    assert caplog.records[-1].getMessage() == f"{sum(falls)} perturbed queries in all diverged in the step before"
    both, expected = (estimators.cge(each, coords[::-1], mu, "central") for each in (steep, smooth))
    assert not both[falls[::-1]].any() and steep.lost == sum(falls)  # on the other side nothing falls
    torch.testing.assert_close(both[~np.array(falls[::-1])], expected[~np.array(falls[::-1])], rtol=1e-9, atol=1e-12)
    steep.bind(windows)
    along, before = list(torch.eye(80, dtype=torch.float64)), steep.queries
    assert steep.directional(along, mu).eq(0).tolist() == falls
    assert steep.lost_queries(before) == np.flatnonzero(falls).tolist()
    steep.bind(windows)
    moved, left = steep.responses(coords, mu), smooth.responses(coords, mu)
    assert not moved[falls].any() and left[falls].flatten(1).any(1).all()
    torch.testing.assert_close(moved[~np.array(falls)], left[~np.array(falls)], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["full", "delta"])
def test_where_all_queries_diverge_the_estimate_is_no_number(cliff, kind):
    make, means, _ = cliff
    engine = make(kind, 1, means[1] + 1e-4, np.nan)
    biases = engine.index.range("layers.2.bias")
    assert engine.differences(biases[:1], 0.01).all()  # of the other channel
    assert not engine.differences([biases[1]] * 7, 0.01).any()  # left out
    assert engine.differences([biases[1]] * 8, 0.01).isnan().all()
    assert engine.responses([biases[1]] * 8, 0.01).isnan().all()


@pytest.mark.parametrize("kind", ["full", "delta"])
def test_a_correction_that_diverges_unperturbed_ends_the_run(cliff, kind):
    make, means, _ = cliff
    with pytest.raises(NumericalError, match="first, unrolled step 2: the corrected solver diverges, before any weight"):
        make(kind, 0, means[0] - 1e-4, np.inf)


def test_a_solver_that_spoils_a_frame_of_the_reference_is_named(cliff):
    make, _, windows = cliff
    with pytest.raises(NumericalError, match=r"^first: cliff makes NaN or infinity of this frame of the reference; "):
        make("full", 0, float(windows.states[0, 0, 0].mean()) - 1e-4, np.nan)


def test_the_bound_is_in_standard_deviations_from_the_reference(cliff):
    make, _, windows = cliff
    loss = make("full").loss
    sigma = loss.correction.sigma[:, 0].numpy()
    for times, beyond in ((0.99, False), (1.01, True)):
        states = windows.states[:, :1] + times * DIVERGED * torch.from_numpy(sigma)
        residuals = (states - windows.states[:, 1:2]) * 0 + times * DIVERGED * torch.from_numpy(sigma)
        losses = loss.weighed(residuals.transpose(0, 1).square())
        assert bool((losses > loss.most).all()) == bool((losses > loss.most).any()) == beyond


# the task


@pytest.fixture(scope="module", autouse=True)
def user(tmp_path_factory, small):
    """Reference files and a simulator of the user's."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "own_simulator.py").write_text(MODULE)
    splits = ("train", "valid", "test")

    def save(name, given):
        parts = {s: (getattr(given, s).states.numpy(), getattr(given, s).parameters.numpy()) for s in splits}
        reference.save(folder / f"{name}.h5", parts, given.about)

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("DZHPC_DATA", str(folder))
        import own_simulator

        ring, p = [torch.randn(2, 2, 10).double()], torch.tensor([0.1, 0.3]).double()
        for _ in range(5):
            ring.append(torch.from_numpy(own_simulator.slow_ring(ring[-1].numpy(), p.numpy())))
        ring = Trajectories(torch.stack(ring, 1).float(), p)
        save("ring", Reference(ring, ring, ring, False, {"staggered": False}))
        save("small", small)
        yield own_simulator


KEYS = ("task.kind=sol", "data.name=small", "data.batch_size=3", "task.resolution=8", "task.factor=2", "task.unroll=4")
REST = ("model.name=corrector", "model.widths=[4]", "sparsity.ratio=0.0", "zo.mu=1e-3", "optim.name=adam")
RING = (*REST, "task.kind=sol", "data.name=ring", "data.batch_size=2", "task.simulator=own_simulator:ring", "task.unroll=2")


def task_of(*overrides, keys=(*KEYS, *REST)):
    return make_task(config.load(None, [*keys, *overrides]), CPU)


def test_windows_are_all_pairs_of_simulation_and_frame_once_an_epoch(small):
    task = task_of()
    assert task.steps_per_epoch == 3 * (12 - 4) // 3
    names = [name for step in range(8) for name in task.windows.batch(step).names]
    assert sorted(names) == sorted(
        f"simulation of parameter {re:g}, frame {f}" for re in (160e3, 640e3, 2560e3) for f in range(8)
    )
    again = [name for step in range(8, 16) for name in task.windows.batch(step).names]
    assert sorted(again) == sorted(names)
    assert again != names
    assert task.windows.batch(3).names == names[9:12]
    batch = task.windows.batch(5)
    for k, name in enumerate(batch.names):
        re, frame = float(name.split()[3].rstrip(",")), int(name.split()[-1])
        s = small.train.parameters.tolist().index(re)
        assert torch.equal(batch.states[k], small.train.states[s, frame : frame + 5])
        assert float(batch.parameters[k]) == re
    assert task_of("run.seed=1").windows.batch(5).names != batch.names


def test_a_limit_leaves_a_random_subset_of_the_windows():
    task = task_of("data.train_limit=7")
    assert task.steps_per_epoch == 2
    names = {name for step in range(40) for name in task.windows.batch(step).names}
    assert len(names) == 7
    assert len({name.split()[3] for name in names}) > 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.name=nothing"], r"nothing.h5: no such file; make it with `python -m dzhpc.simulate INPUT -o .*nothing.h5`"),
        (["task.unroll=12"], "task.unroll = 12: the reference has 12 frames; it needs 13"),
        (["data.batch_size=25"], "data.batch_size = 25: there are 24 windows"),
        (["data.train_limit=2"], "data.batch_size = 3: there are 2 windows"),
        (["task.factor=4"], "task.factor = 4: the reference small was made with 2"),
        (["task.radius=5.0"], "task.radius = 5, the reference was made with 10"),
        (["task.resolution=16"], "task.resolution = 16 has states"),
        (["model.name=own_simulator:Wrong"], "Wrong gives .* a correction has to be"),
        (["model.kernel=4"], "kernel = 4, .*expected positive numbers, an odd kernel"),
        (["task.simulator=phiflow", "zo.estimator=autograd"], "no gradient goes through task.simulator = phiflow"),
        (["sparsity.ratio=0.5", "sparsity.scores=fo-grasp"], "a simulator has no second derivative"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        task_of(*overrides)


@pytest.mark.parametrize("engine", ["full", "delta"])
def test_a_users_simulator_is_asked_as_often_as_is_said(user, engine):
    task = task_of(f"zo.engine={engine}", keys=RING)
    user.ASKED.clear()
    task.bind(0)
    assert sum(user.ASKED) == task.cost.bind == 2 * 2
    task.engine.differences(np.arange(7), 1e-3)
    assert sum(user.ASKED) == task.simulator.queries == task.cost.bind + 7 * task.cost.query
    user.ASKED.clear()
    task.evaluate(range(2), 0)
    assert sum(user.ASKED) == task.cost.evaluation == 2 * 5


def test_pairs_need_no_gradient_of_a_users_simulator():
    """NON: one step, the solver before the network."""
    task = task_of("task.unroll=1", "zo.estimator=autograd", keys=RING)
    randomised(task.model)
    rows = task.shared.rows(range(PARTS), 0)
    loss, gradient = task.shared.join(rows)
    assert loss == pytest.approx(task.bind(0), rel=1e-6)
    queried = dzhpc.cge(task.engine, np.arange(task.engine.index.size), 1e-3, "central")
    assert torch.cosine_similarity(queried, gradient, dim=0) > 0.999
    assert task.cost.query == 0


def test_pairs_have_a_forecast_though_a_query_asks_the_simulator_nothing():
    task = task_of("task.unroll=1", "sparsity.ratio=0.5", "sparsity.q=2", keys=RING)
    task.bind(0)
    found = Forecast(task, every=False)
    assert found.per_step == task.cost.bind and task.cost.query == 0 and found.run_s(found.model.step(1, 1)) > 0


def test_first_order_parts_add_up_to_the_gradient_of_the_loss():
    task = task_of("zo.estimator=autograd")
    randomised(task.model)
    loss, gradient = task.shared.join(np.concatenate([task.shared.rows(range(k, k + 2), 5) for k in range(0, PARTS, 2)]))
    assert loss == pytest.approx(task.bind(5), rel=1e-6)
    whole = task.engine.index.flatten(task.engine.gradient())
    torch.testing.assert_close(gradient, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def test_a_correction_that_diverges_untrained_is_not_blamed_on_training():
    task = task_of()
    randomised(task.model)
    with torch.no_grad():
        for p in task.model.parameters():
            p.mul_(1e6)
    with pytest.raises(NumericalError, match="before any weight is perturbed; nothing was trained yet: look at the simulator"):
        task.bind(0)
    with pytest.raises(NumericalError, match=r"perturbed; lower optim\.lr, and go back to an earlier checkpoint"):
        task.bind(1)


def test_scores_too_far_from_theta_say_so():
    """(A3) is a sum over thousands of cells, so ZO-GraSP's mu times its gradient may be no small step."""
    task = task_of()
    with torch.no_grad():
        task.model.layers[2].bias.fill_(1e6)  # as after such a step
    with pytest.raises(NumericalError, match=r'lower zo\.mu, or use sparsity\.scores = "random"'):
        task.bind_for_scores(0)


def test_scores_of_pairs_may_be_first_order():
    task = task_of("task.unroll=1", "sparsity.scores=fo-grasp", "sparsity.ratio=0.5")
    randomised(task.model)
    task.bind_for_scores(0)
    assert float(task.engine.index.flatten(task.engine.hessian_gradient()).abs().max()) > 0


def test_an_evaluation_is_the_mean_error_over_the_valid_simulations(small):
    task = task_of()
    randomised(task.model, 0.01)
    rows = np.concatenate([task.evaluate(range(1, 2), 0), task.evaluate(range(0, 1), 0)])
    assert task.evaluation_parts == 2
    assert task.cost.evaluation == 2 * 11
    assert np.isnan(rows[:, 1]).all()
    assert rows[:, 2].tolist() == [1, 1]
    found = rollout(task.simulator, task.correction, small.valid, small.where(), 11)
    assert rows[::-1, 0] == pytest.approx(found.mae(11).numpy(), rel=1e-5)
    assert min(rows[:, 0]) > 0


def test_an_evaluation_that_diverges_is_a_number_and_is_said(caplog):
    task = task_of()
    with torch.no_grad():
        task.model.layers[2].bias.fill_(1e6)
    rows = task.evaluate(range(2), 7)
    assert np.isfinite(rows[:, 0]).all()
    assert "evaluation at step 7: simulation of parameter 905000 diverges at step 1 of 11" in caplog.text


def test_a_model_that_needs_the_contiguous_layout_has_it(small, monkeypatch):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3, padding=1)

        def forward(self, x):
            return self.conv(x).view(len(x), -1).view(len(x), 2, 8, 16)

    monkeypatch.setattr(zoo, "build", lambda section, seed: Flat())
    task = task_of()
    assert task.model.conv.weight.is_contiguous()
    assert task.bind(0) > 0


def test_a_checkpoint_of_the_task_is_a_network_again(tmp_path):
    task = task_of()
    randomised(task.model)
    state = dict(
        config=task.config.to_toml(), history=[], step=1, epoch=0.1, queries=1, wall_time_s=0.0, run_uuid="x",
        model_sha256=model_sha256(task.model), seed=0, params=dict(task.model.named_parameters()), buffers={}, optimizer={},
        coordinates=np.arange(3), lpr=None, env={}, partial=None,
    )  # fmt: skip
    save_checkpoint(tmp_path / "step-00000001.h5", State(**state))
    model = dzhpc.load_model(tmp_path / "step-00000001.h5")
    assert ParameterIndex.of(model).size == 506
    x = torch.randn(2, 3, 8, 16)
    torch.testing.assert_close(model(x), task.model(x))
