"""Rollouts, the choice of a checkpoint, and the table of the solver in the loop."""

import numpy as np
import pytest
import torch
from PIL import Image

from dzhpc import config as configuration
from dzhpc.errors import CheckpointError, InputError
from dzhpc.files import drawing
from dzhpc.files.checkpoint import State
from dzhpc.files.runfolder import RunFolder
from dzhpc.tasks.sol import evaluation, figures, reference, results, wake
from dzhpc.tasks.sol.reference import Trajectories
from dzhpc.tasks.sol.rollout import DIVERGED, Rollout, rollout

STEPS, SHAPE = 7, (2, 3, 4)
WHERE = torch.ones(SHAPE, dtype=torch.bool)
WHERE[0, :, -1] = WHERE[1, -1] = False


def decay(states, parameters):
    """A solver: every simulation at its own rate."""
    return states * parameters.to(states)[:, None, None, None]


def correct(states, parameters):
    return states + 0.01


def trajectories(rates, frames=STEPS + 1):
    draw = torch.Generator().manual_seed(1)
    states = torch.randn(len(rates), frames, *SHAPE, generator=draw) * WHERE
    return Trajectories(states, torch.tensor(rates, dtype=torch.float64))


def plain_errors(given, s, corrected):
    """Mean |difference| after each step, one simulation and one entry at a time."""
    state, errors = given.states[s, 0].double(), []
    for step in range(1, STEPS + 1):
        state = state * float(given.parameters[s]) + (0.01 if corrected else 0)
        entries = [k for k in range(WHERE.numel()) if WHERE.flatten()[k]]
        difference = (state - given.states[s, step].double()).flatten()
        errors.append(sum(abs(float(difference[k])) for k in entries) / len(entries))
    return errors


def test_errors_are_those_of_a_plain_loop_over_existing_entries():
    given = trajectories([0.9, 1.05, 0.5])
    for correction in (None, correct):
        errors = rollout(decay, correction, given, WHERE, STEPS).errors
        plain = torch.tensor([plain_errors(given, s, correction is not None) for s in range(3)], dtype=torch.float64)
        assert errors.dtype == torch.float64
        torch.testing.assert_close(errors, plain, rtol=1e-6, atol=1e-6)


def test_mae_is_the_mean_over_the_first_steps():
    done = rollout(decay, None, trajectories([0.9, 1.05]), WHERE, STEPS)
    assert done.mae(3).tolist() == [(a + b + c) / 3 for a, b, c in done.errors[:, :3].tolist()]
    assert not torch.equal(done.mae(3), done.mae(STEPS))


def test_a_diverging_simulation_is_flagged_and_leaves_the_others_alone():
    calm = rollout(decay, correct, trajectories([0.9, 0.9, 0.8]), WHERE, STEPS)
    for rate in (2.0, 1e30, torch.nan):
        seen = []

        def watched(states, parameters, seen=seen):
            seen.append(bool(torch.isfinite(states).all()))
            return decay(states, parameters)

        wild = rollout(watched, correct, trajectories([0.9, rate, 0.8]), WHERE, STEPS, keep=(1, STEPS))
        assert torch.equal(wild.errors[[0, 2]], calm.errors[[0, 2]])  # to the bit
        step = int(wild.diverged[1])
        assert wild.diverged.tolist() == [0, step, 0] and step == {2.0: 2}.get(rate, 1)
        assert torch.isfinite(wild.errors[1, : step - 1]).all() and torch.isinf(wild.errors[1, step - 1 :]).all()
        assert torch.isinf(wild.mae(STEPS)[1]) and torch.isfinite(wild.mae(STEPS)[[0, 2]]).all()
        assert torch.isnan(wild.kept[STEPS][1]).all() and torch.isfinite(wild.kept[STEPS][[0, 2]]).all()
        assert all(seen)  # the solver never gets a state that has blown up
    assert calm.diverged.tolist() == [0, 0, 0]


def test_the_capped_mean_is_finite_and_grows_with_an_earlier_divergence():
    late, early = (rollout(decay, None, trajectories([rate]), WHERE, STEPS) for rate in (2.0, 1e9))
    assert 1 == int(early.diverged) < int(late.diverged)
    bound = DIVERGED * float(trajectories([2.0]).states[:, :, WHERE].double().square().mean().sqrt())
    assert float(early.capped(STEPS)) == bound
    before = late.errors[0, : int(late.diverged) - 1]
    expected = (float(before.sum()) + bound * (STEPS - len(before))) / STEPS
    assert abs(float(late.capped(STEPS)) - expected) < 1e-12 and expected < bound


def test_kept_states_are_those_after_the_step():
    given = trajectories([0.5])
    kept = rollout(decay, None, given, WHERE, STEPS, keep=(0, 3)).kept
    assert set(kept) == {0, 3}
    assert torch.equal(kept[3], given.states[:, 0] * 0.125)


# --- checkpoints, methods, tables: a user's solver that multiplies by 0.9, a network that multiplies by 1 + gain ---

MODULE = """
import torch

def step(states, parameters):
    return 0.9 * states

class Gain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.gain * x[:, :-1]
"""
FRAMES, X = 20, 6
GAINS = {"valid": 0.97 / 0.9 - 1, "test": 0.95 / 0.9 - 1}  # what would be right for these simulations


def decaying(rate, count):
    start = np.random.default_rng(0).uniform(1, 2, (count, 1, X))
    return start * rate ** np.arange(FRAMES)[:, None]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the user's module, ``sol.toml``, and a reference whose valid and test simulations want different networks."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "shrinking.py").write_text(MODULE)
    (folder / "sol.toml").write_text(
        '[task]\nkind = "sol"\nsimulator = "shrinking:step"\n[model]\nname = "shrinking:Gain"\n[data]\nname = "decay"\n'
    )
    splits = {
        "train": (decaying(0.97, 2), [1.0, 2.0]),
        "valid": (decaying(0.97, 1), [1.5]),
        "test": (decaying(0.95, 2), [3.0, 4.0]),
    }
    reference.save(folder / "decay.h5", splits, {"staggered": False})
    return folder


@pytest.fixture(autouse=True)
def _module_on_the_path(place, monkeypatch):
    monkeypatch.syspath_prepend(str(place))


def save_run(place, name, gains, seed=0, **options):
    """A run folder with a checkpoint for each gain, at steps 10, 20, ..."""
    config = configuration.load(
        place / "sol.toml", [f"run.seed={seed}", *(f"{k.replace('__', '.')}={v}" for k, v in options.items())]
    )
    folder = RunFolder(place / name)
    folder.create()
    for k, gain in enumerate(gains, 1):
        params = {"gain": torch.tensor([gain])}
        numbers = {"step": 10 * k, "epoch": 0.0, "queries": 0, "wall_time_s": 0.0, "seed": seed}
        text = {"config": config.to_toml(), "run_uuid": "", "model_sha256": ""}
        state = State(**text, **numbers, history=[], params=params, buffers={}, optimizer={}, coordinates=np.zeros(0), lpr=None)
        folder.save(state, keep=99)
    return str(place / name)


def alone(n, evaluate):
    """What World.split gives on one rank."""
    return evaluate(range(n))


def evaluated(place, sources, steps=FRAMES - 1):
    """(runs, methods) as the verb makes them."""
    runs = evaluation.read_all(sources, str(place))
    experiment = evaluation.Experiment(runs[0].config, torch.device("cpu"))
    runs = [run for run in runs if run.checkpoints]
    evaluation.choose(experiment, runs, steps, alone)
    return runs, results.group([None, *runs], evaluation.measure(experiment, [None, *runs], steps, alone))


def test_the_valid_simulations_choose_the_checkpoint_whatever_the_test_ones_say(place):
    source = save_run(place, "choice", [0.0, GAINS["test"], GAINS["valid"], 0.2])
    (run,), (src, method) = evaluated(place, [source])
    assert run.chosen == 2 and run.state.step == 30
    assert run.scores[2] < 1e-6 < min(run.scores[k] for k in (0, 1, 3))
    starts = decaying(0.95, 2)[:, 0].mean(1)  # the mean of |x|, which all steps multiply
    k = np.arange(1, FRAMES)
    for found, rate in ((method, 0.97), (src, 0.9)):
        expected = [start * np.mean(np.abs(rate**k - 0.95**k)) for start in starts]
        np.testing.assert_allclose(found.mae(FRAMES - 1)[0].numpy(), expected, rtol=1e-4)


def test_a_checkpoint_that_diverges_on_the_valid_simulations_is_not_chosen(place):
    (run,), _ = evaluated(place, [save_run(place, "wild", [1.0, 0.01, 9.0])])
    assert run.chosen == 1
    assert np.isfinite(run.scores).all() and run.scores[1] < run.scores[0] < run.scores[2]


def test_runs_that_differ_in_their_seed_alone_are_one_method(place):
    gains = {"a": (0.01, 0), "a-1": (0.03, 1), "b": (0.05, 0)}
    sources = [save_run(place, name, [gain], seed, optim__lr=0.5 if name == "b" else 0.1) for name, (gain, seed) in gains.items()]
    _, methods = evaluated(place, sources)
    assert [(m.name, len(m.runs)) for m in methods] == [("SRC", 1), ("a", 2), ("b", 1)]
    values = methods[1].mae(5)
    assert values.shape == (2, 2)
    row = next(line for line in results.summary(methods, [5]).splitlines() if line.startswith("| a |")).split(" | ")
    assert row[1] == "2"
    assert float(row[2]) == pytest.approx(float(values.mean()), abs=5e-5)
    assert float(row[3]) == pytest.approx(float(values.mean(0).std()), abs=5e-5)
    assert float(row[4]) == pytest.approx(float(values.mean(1).std()), abs=5e-5)


def test_the_same_seed_twice_is_two_methods_and_needs_two_names(place):
    source = save_run(place, "twice", [0.01, 0.02])
    files = [f"{source}/checkpoints/step-000000{k}0.h5" for k in (1, 2)]
    _, methods = evaluated(place, files)
    assert [m.name for m in methods] == ["SRC", "twice-step-00000010", "twice-step-00000020"]
    with pytest.raises(InputError, match="several methods would be called twice-step-00000010"):
        evaluated(place, [files[0], files[0]])


def test_a_divergence_is_named_and_never_averaged(place):
    bad = Rollout(torch.tensor([[0.1, 0.3, 0.2], [0.4, torch.inf, torch.inf]], dtype=torch.float64), torch.tensor([9.0, 9.0]))
    methods = [results.Method("SRC", [None], [bad])]
    text = results.tables(methods, [3.0, 4.0], [1, 3], "parameter")
    assert "| SRC |  | 0.2500 | 0.2121 |  | 0.2000 (1 of 2) |  |  | 1 of 2 |" in text
    assert "| SRC |  |  | 0.2000 | diverged at step 2 | 0.2000 (1 of 2) |" in text
    lines = [line.split("\t") for line in results.tsv(methods, [3.0, 4.0], [1, 3]).splitlines()]
    assert lines[0] == list(results.COLUMNS)
    assert lines[1] == ["SRC", "", "", "", "3.0", "1", "0.1", "0"]
    assert lines[4] == ["SRC", "", "", "", "4.0", "3", "inf", "2"]


def test_horizons():
    assert results.horizons(None, 500) == [100, 500]
    assert results.horizons(None, 60) == [60]
    assert results.horizons([7, 3, 7], 60) == [3, 7]
    with pytest.raises(InputError, match="--steps 61: expected 1 to 60, the frames of the reference"):
        results.horizons([5, 61], 60)


def test_sources_that_cannot_be_compared(place):
    source = save_run(place, "one", [0.1])
    other = save_run(place, "other", [0.1], task__radius=5.0)
    with pytest.raises(InputError, match=r"task\.radius is 5\.0 in other, 10\.0 in one: a table is of one experiment"):
        evaluation.read_all([source, other])
    assert [run.name for run in evaluation.read_all([str(place / "sol.toml"), other])] == ["other"]
    (place / "digits.toml").write_text("")
    with pytest.raises(InputError, match=r'digits\.toml: task\.kind = "classification", expected "sol"'):
        evaluation.read_all([str(place / "digits.toml")])
    (place / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: holds no checkpoint"):
        evaluation.read_all([str(place / "empty")])
    run = evaluation.read(source)
    run.config.data.root = str(place / "empty")
    with pytest.raises(InputError, match=r"empty/decay\.h5: no such file; make it with `python -m dzhpc\.simulate INPUT -o"):
        evaluation.Experiment(run.config, torch.device("cpu"))


def test_two_solvers_of_one_name_are_not_one_experiment(tmp_path):
    sources = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "i.toml").write_text('[task]\nkind = "sol"\nsimulator = "own:step"\nreference = "own:whole"\n')
        (tmp_path / name / "own.py").write_text("step = whole = abs\n")
        sources.append(str(tmp_path / name / "i.toml"))
    assert len(evaluation.read_all(sources)) == 2
    (tmp_path / "b" / "own.py").write_text("step = whole = len\n")
    with pytest.raises(InputError, match=r"a/own\.py and \S+b/own\.py are two modules of one name: a table is of one experiment"):
        evaluation.read_all(sources)


# --- figures ---


def test_vorticity_of_a_solid_body_rotation():
    grid = wake.Wake(8)
    x, y = np.meshgrid(np.arange(9) * grid.dx, (np.arange(16) + 0.5) * grid.dx, indexing="ij")
    u = -0.25 * torch.from_numpy(y)[None]
    x, y = np.meshgrid((np.arange(8) + 0.5) * grid.dx, np.arange(17) * grid.dx, indexing="ij")
    v = 0.25 * torch.from_numpy(x)[None]
    omega = figures.vorticity(wake.pack(u, v), grid)
    assert omega.shape == (1, 7, 15)
    torch.testing.assert_close(omega, torch.full_like(omega, 2 * 0.25 * 20.0))  # 2 Omega D / U, D = 20


def test_figures_of_the_wake_and_of_lines(tmp_path):
    """Their sizes follow from what is shown: a panel a solver and a time, a frame of the GIF a step."""
    steps = [0, 2, 5]
    draw = np.random.default_rng(0)
    cases = {"wake": (wake.Wake(8), (2, 9, 17)), "lines": (None, (6,)), "images": (None, (1, 5, 7))}
    for name, (grid, shape) in cases.items():
        scene = figures.Scene(grid)
        rows = {key: torch.from_numpy(draw.normal(size=(3, *shape))) for key in ("reference", "SRC", "net")}
        rows["net"][1:] = torch.nan
        figures.states(rows, steps, scene, "title", tmp_path / f"{name}.png")
        figures.animation(rows, steps, scene, "title", tmp_path / f"{name}.gif")
        with Image.open(tmp_path / f"{name}.gif") as gif:
            assert gif.n_frames == 3
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert (picture.height > picture.width / 3) == (name != "lines")
            assert picture.width > 800


def test_the_flow_goes_to_the_right_and_the_rod_lies_at_the_origin():
    plt = drawing.pyplot()
    figure, axes = plt.subplots()
    scene, omega = figures.Scene(wake.Wake(8)), np.zeros((7, 15))
    shown = scene.image(axes, omega, (-1, 1))
    assert shown.get_extent() == pytest.approx([-50 / 20 + 0.3125, 150 / 20 - 0.3125, 50 / 20 - 0.3125, -50 / 20 + 0.3125])
    assert axes.patches[0].center == (0, 0) and axes.patches[0].radius == 0.5
    plt.close(figure)
    assert scene.time(500) == 25 and scene.simulation(240000.0) == "re = 240000, U D / ν = 480"
