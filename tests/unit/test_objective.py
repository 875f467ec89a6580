"""The user's own loss: differences through any function of thetas, numpy or torch, in calls of a limited size."""

import numpy as np
import pytest
import torch

import dzhpc
from dzhpc import config
from dzhpc.errors import InputError
from dzhpc.method import estimators, gauss_newton
from dzhpc.tasks import make_task, objective

MODULE = '''
import numpy as np
import torch

CALLS = []


class Numpy:
    """1/2 |theta - step|^2, weighted."""

    def initial(self):
        return np.array([1.0, 2.0, 3.0, 4.0, 5.0])

    def __call__(self, thetas, step):
        CALLS.append((type(thetas), thetas.shape))
        return 0.5 * ((thetas - step) ** 2 * np.arange(1, 6)).sum(1)


class Torch(Numpy):
    def initial(self):
        return torch.arange(1.0, 6.0)

    def __call__(self, thetas, step):
        CALLS.append((type(thetas), thetas.shape))
        return 0.5 * ((thetas - step) ** 2 * torch.arange(1, 6)).sum(1)


class Blocks(Numpy):
    def initial(self):
        return {"matrix": np.array([[1.0, 2.0], [3.0, 4.0]]), "last": np.array(5.0)}


class Floats(Numpy):
    def initial(self):
        return [1.0, 2.0, 3.0, 4.0, 5.0]


class Integers(Numpy):
    def initial(self):
        return np.arange(1, 6)


class Greedy(Numpy):
    """Scribbles into what it was given."""

    def __call__(self, thetas, step):
        losses = super().__call__(thetas, step)
        thetas[:] = 99
        return losses


class Column(Numpy):
    def __call__(self, thetas, step):
        return thetas[:, :1]


class Scalar(Numpy):
    def __call__(self, thetas, step):
        return 0.5


class Named(Numpy):
    """Names that a Module has, too, and one with a dot."""

    def initial(self):
        return {"half": np.ones(2), "type": np.ones(1), "training": np.ones(1), "layer.weight": np.ones(1)}


class Endian(Numpy):
    def initial(self):
        return super().initial().astype(">f8")[::-1]

    def __call__(self, thetas, step):
        return super().__call__(thetas, step).astype(">f8")


class Slashed(Numpy):
    def initial(self):
        return {"layer/weight": np.ones(5)}


class Complex(Numpy):
    def initial(self):
        return np.ones(5) * 1j


class NotANumber(Numpy):
    def initial(self):
        return {"a": np.ones(4), "b": np.array([np.nan])}


class Half(Numpy):
    def initial(self):
        return np.ones(5, np.float16)


class Void(Numpy):
    def initial(self):
        return {"a": np.zeros(0), "b": np.zeros((3, 0))}


class Unlicensed(Numpy):
    def initial(self):
        raise SystemExit("no license")


class Walled(Numpy):
    """Infeasible once theta_1 or theta_3 grows."""

    def __call__(self, thetas, step):
        return np.where((thetas[:, [1, 3]] > [2, 4]).any(1), np.inf, super().__call__(thetas, step))


class Residuals:
    initial = Numpy.initial

    def residuals(self, thetas, step):
        return (thetas - step) * np.arange(1, 6)


class WalledResiduals(Residuals):
    def residuals(self, thetas, step):
        above = (thetas[:, [1, 3]] > [2, 4]).any(1)
        return np.where(above[:, None], np.inf, super().residuals(thetas, step))


class Empty(Numpy):
    def initial(self):
        return {}


class Words(Numpy):
    def initial(self):
        return "theta"


class NoInitial:
    def __call__(self, thetas, step):
        return thetas[:, 0]


class NoCall:
    def initial(self):
        return np.ones(5)


ready = Numpy()
number = 5
'''


@pytest.fixture(scope="module", autouse=True)
def user_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "own_objective.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def task_of(name, *overrides):
    keys = ["task.kind=objective", f"task.function=own_objective:{name}", "sparsity.ratio=0.0", *overrides]
    return make_task(config.load(None, keys), torch.device("cpu"))


def calls():
    import own_objective

    found = list(own_objective.CALLS)
    own_objective.CALLS.clear()
    return found


THETA, WEIGHTS = np.arange(1.0, 6.0), np.arange(1.0, 6.0)


@pytest.mark.parametrize("name", ["Numpy", "Torch", "Blocks", "Integers", "Floats", "ready"])
def test_the_estimate_is_the_gradient_for_numpy_torch_and_blocks(name):
    task = task_of(name)
    base = task.bind(step=2)
    assert base == pytest.approx(0.5 * ((THETA - 2) ** 2 * WEIGHTS).sum())
    gradient = dzhpc.cge(task.engine, np.arange(5), 1e-3, "central")
    tolerance = 1e-2 if name == "Torch" else 1e-8
    assert np.allclose(gradient.numpy(), (THETA - 2) * WEIGHTS, atol=tolerance)
    assert {kind for kind, _ in calls()} == {torch.Tensor if name == "Torch" else np.ndarray}


def test_parameters_keep_the_precision_that_the_user_gave():
    dtypes = {name: task_of(name).engine.index.dtype for name in ("Numpy", "Torch", "Integers", "Floats")}
    assert dtypes == {"Numpy": torch.float64, "Torch": torch.float32, "Integers": torch.float64, "Floats": torch.float64}


def test_named_blocks_are_parameters_of_their_shapes_and_reach_the_function_flat():
    task = task_of("Blocks")
    assert {name: tuple(p.shape) for name, p in task.model.named_parameters()} == {"matrix": (2, 2), "last": ()}
    task.bind(0)
    task.engine.differences([4], 0.1)
    assert [shape for _, shape in calls()] == [(1, 5), (1, 5)]


@pytest.mark.parametrize(("limit", "sizes"), [(2, [2, 2, 1]), (3, [3, 2]), (100, [5])])
def test_no_call_holds_more_than_batch_limit_thetas(limit, sizes):
    task = task_of("Numpy", f"task.batch_limit={limit}")
    task.bind(0)
    calls()
    task.engine.differences(np.arange(5), 0.1)
    assert [shape[0] for _, shape in calls()] == sizes
    task.engine.directional(torch.eye(5, dtype=torch.float64), 0.1)
    assert [shape[0] for _, shape in calls()] == sizes
    assert task.engine.queries == 1 + 5 + 5
    assert max(len(chunk) for chunk in task.engine.cut(np.arange(5000))) <= limit


def test_differences_do_not_depend_on_the_limit_and_a_direction_along_an_axis_is_a_coordinate():
    tasks = [task_of("Numpy", f"task.batch_limit={n}") for n in (1, 4)]
    for task in tasks:
        task.bind(3)
    one, four = (task.engine.differences([4, 0, 0, 2], -0.2) for task in tasks)
    assert torch.equal(one, four)
    axes = torch.eye(5, dtype=torch.float64)[[4, 0, 0, 2]]
    assert torch.equal(one, tasks[0].engine.directional(axes, -0.2))


def test_chunks_cover_the_coordinates_once():
    engine = task_of("Numpy").engine
    for n in (0, 1, 15, 16, 17, 5000):
        assert [k for chunk in engine.cut(np.arange(n)) for k in chunk] == list(range(n))


def test_a_function_that_writes_into_its_arguments_does_not_change_theta():
    task, clean = task_of("Greedy"), task_of("Numpy")
    for each in (task, clean):
        each.bind(1)
    assert torch.equal(task.engine.differences(np.arange(5), 0.1), clean.engine.differences(np.arange(5), 0.1))
    assert task.model.theta.tolist() == THETA.tolist()


def test_an_evaluation_is_the_loss_at_theta_without_an_accuracy():
    rows = task_of("Numpy").evaluate(range(1), step=2)
    assert rows[0, 0] == pytest.approx(0.5 * ((THETA - 2) ** 2 * WEIGHTS).sum())
    assert np.isnan(rows[0, 1])
    assert rows[0, 2] == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Column", r"own_objective:Column: gave losses \[1, 1\]; expected \[1\], one a theta"),
        ("Scalar", r"gave losses \[\]; expected"),
    ],
)
def test_losses_of_a_wrong_shape_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        task_of(name).bind(0)


@pytest.mark.parametrize("name", ["NoInitial", "NoCall", "number", "absent", "Empty", "Words", "Slashed", "Complex"])
def test_an_objective_that_cannot_be_used_is_refused_by_its_name(name):
    with pytest.raises(InputError, match=f"own_objective:{name}|own_objective has no 'absent'"):
        task_of(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Complex", r"initial\(\) gave what is no theta0 \(block theta is complex numbers; expected real ones\)"),
        ("NotANumber", r"initial\(\) gave what is no theta0 \(block b holds a number that is not finite\)"),
        ("Empty", r"initial\(\) gave what is no theta0 \(no block\)"),
        ("Half", r"initial\(\) gave what is no theta0 \(block theta is float16; expected float32 or float64\)"),
        ("Void", r"initial\(\) gave what is no theta0 \(it holds no number\)"),
        ("Unlicensed", r"own_objective:Unlicensed: initial\(\): SystemExit: no license, at .*own_objective\.py:\d+ in initial"),
    ],
)
def test_a_theta0_that_cannot_be_trained_says_what_it_is(name, message):
    with pytest.raises(InputError, match=message):
        task_of(name)


def test_blocks_may_have_the_names_of_methods():
    task = task_of("Named")
    assert [name for name, _ in task.model.named_parameters()] == ["half", "type", "training", "layer.weight"]
    task.bind(0)
    assert task.engine.differences([4], 2.0).tolist() == [0.5 * 5 * (9 - 1)]


def test_big_endian_arrays_and_negative_strides_are_arrays():
    task = task_of("Endian")
    assert task.model.theta.tolist() == THETA[::-1].tolist()
    assert task.bind(2) == 0.5 * ((THETA[::-1] - 2) ** 2 * WEIGHTS).sum()


def test_a_step_that_theta_rounds_away_is_said_once(caplog):
    theta = np.array([1.0, 1e5, 300.0])
    for dtype in (np.float64, np.float32):
        blocks = objective.Blocks(theta.astype(dtype))
        engine = objective.ObjectiveEngine(lambda t, step: (t.astype(float) ** 2).sum(1), blocks, True, 2, 0, "f")
        engine.bind(0)
        for _ in range(2):
            found = engine.differences(range(3), 1e-3)
        assert bool(found[1]) == (dtype == np.float64)
    assert caplog.messages == [
        "f: mu = 0.001 becomes a step of 0 at theta[1] (coordinate 1), since theta is float32; raise zo.mu, scale theta, or give "
        "it in float64"
    ]


def test_an_infeasible_theta_stays_out_of_the_step_and_is_counted_and_named(monkeypatch, caplog):
    monkeypatch.setattr(objective.log, "propagate", True)
    task, free = task_of("Walled"), task_of("Numpy")
    for each in (task, free):
        each.bind(0)
    found, expected = (each.engine.differences(np.arange(5), 0.1) for each in (task, free))
    expected[[1, 3]] = 0
    assert torch.equal(found, expected)
    assert task.lost == 2
    assert caplog.messages == [
        "task.function = own_objective:Walled: infeasible (+inf) when theta[1] (coordinate 1) is perturbed: "
        "it stays out of this step"
    ]
    axes = torch.eye(5, dtype=torch.float64)
    assert torch.equal(task.engine.directional(axes, 0.1), expected)
    task.bind(1)
    assert caplog.messages[1:] == ["4 infeasible thetas in all in the step before"]
    assert task.lost == 0


@pytest.mark.parametrize(("name", "without"), [("Walled", "Numpy"), ("WalledResiduals", "Residuals")])
def test_a_theta_that_is_infeasible_on_one_side_stays_out_of_central_differences(name, without):
    """Half of a slope would be none."""
    task, free = task_of(name), task_of(without)
    for each in (task, free):
        each.bind(0)
    coords = np.array([3, 0, 1, 4])
    found, expected = (estimators.cge(each.engine, coords, 0.1, "central") for each in (task, free))
    assert found.tolist() == [0, float(expected[1]), 0, float(expected[3])] and expected.all()
    assert task.engine.lost_queries(0) == [] and task.lost == 2  # the walls are above
    index, seed = task.engine.index, 3
    along = [estimators.rge_slopes(each.engine, range(8), 0.1, seed, np.arange(5), "central") for each in (task, free)]
    up = task.engine.directional(estimators.directions(index, range(8), seed, np.arange(5)), 0.1) != 0
    down = task.engine.directional(estimators.directions(index, range(8), seed, np.arange(5)), -0.1) != 0
    assert torch.equal(along[0], along[1].where(up & down, 0)) and (up != down).any()
    if name != "Walled":
        columns = [gauss_newton.columns(each.engine, coords, 0.1, "central") for each in (task, free)]
        assert not columns[0][[0, 2]].any() and torch.equal(columns[0][[1, 3]], columns[1][[1, 3]])


@pytest.mark.parametrize("residuals", [False, True])
def test_answers_keep_their_digits_where_theta_has_fewer(residuals):
    """theta0 in float32, losses around 1,000 in float64: a unit in the last place of float32 is 6e-5, a difference 2e-3."""

    class Wide:
        def __call__(self, thetas, step):
            return 1000 + (thetas.astype(np.float64) - 1.0) ** 2 @ np.ones(3)

    if residuals:
        Wide.residuals = lambda self, thetas, step: 1000 + thetas.astype(np.float64)
    engine = objective.ObjectiveEngine(Wide(), objective.Blocks(np.zeros(3, np.float32)), True, 8, 0, "wide")
    assert engine.bind(0) == (1e6 if residuals else 1003)
    found = estimators.cge(engine, [0, 1, 2], 1e-3, "central")
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx([2000 / 3 if residuals else -2] * 3, rel=1e-6)
    if residuals:
        assert engine.responses([0], 1e-3).tolist()[0] == pytest.approx([1e-3, 0, 0], rel=1e-6)


def test_a_coordinate_out_of_range_is_refused_before_any_query():
    task = task_of("Numpy")
    task.bind(0)
    with pytest.raises(InputError, match=r"outside 0\.\.4"):
        task.engine.differences([0, 5], 0.1)
    assert task.engine.queries == 1


def test_the_shipped_example_is_at_most_thirty_lines(project):
    assert len((project / "examples" / "own_loss.py").read_text().splitlines()) <= 30
