"""What the loop asks of an estimator, what a budget allows, and what the progress line says."""

import importlib
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nets import tanh_net, vectors

import dzhpc
from dzhpc import config
from dzhpc.config import Zo, sections
from dzhpc.errors import InputError
from dzhpc.files.metrics import load_columns
from dzhpc.files.runfolder import RunFolder
from dzhpc.job import log
from dzhpc.job.stopping import Reason
from dzhpc.job.world import World
from dzhpc.method.estimators import ESTIMATORS, make_estimator
from dzhpc.tasks import make_task
from dzhpc.tasks.protocol import Cost
from dzhpc.training import record, trainer
from dzhpc.training.budget import Budget
from dzhpc.training.forecast import Forecast
from dzhpc.training.record import Progress, Step


def bound():
    engine = dzhpc.make_engine("reuse", tanh_net(4, 6, 4), "mse")
    engine.bind(*vectors())
    return engine


@pytest.mark.parametrize(
    ("zo", "units", "perturbations"),
    [
        (Zo(estimator="cge"), 7, 7),
        (Zo(estimator="cge", difference="central"), 7, 14),
        (Zo(estimator="rge"), 7, 7),
        (Zo(estimator="rge", q=3, difference="central"), 3, 6),
        (Zo(estimator="autograd"), 0, 0),
        (Zo(estimator="latent"), 0, 0),
        (Zo(estimator="pattern"), 7, 14),
        (Zo(estimator="fg-w", q=3), 3, 3),
        (Zo(estimator="lg-fg-a"), 0, 1),
        (Zo(estimator="fa"), 0, 0),
    ],
)
def test_units_and_perturbations_of_a_step_on_seven_coordinates(zo, units, perturbations):
    estimator = make_estimator(zo, 0)
    assert (estimator.units(7), estimator.perturbations(7)) == (units, perturbations)


@pytest.mark.parametrize("kind", ["cge", "rge"])
def test_numbers_of_units_do_not_depend_on_their_pieces_and_combine_to_the_estimate(kind):
    engine, coords = bound(), np.array([1, 2, 5, 11, 30])
    estimator = make_estimator(Zo(estimator=kind, mu=1e-4, q=6 if kind == "rge" else None), 3)
    n = estimator.units(len(coords))
    whole = estimator.evaluate(engine, coords, 2, range(n))
    pieces = torch.cat([estimator.evaluate(engine, coords, 2, piece) for piece in (range(2), range(2, 3), range(3, n))])
    assert torch.equal(whole, pieces)
    estimate = estimator.combine(engine, coords, 2, whole)
    exact = make_estimator(Zo(estimator="autograd"), 3).combine(engine, coords, 2, torch.zeros(0))
    assert estimate.shape == exact.shape == (5,)
    if kind == "cge":
        assert torch.allclose(estimate, exact, rtol=1e-3, atol=1e-4)
        assert estimator.place(engine.index, coords, 3) == f"the difference at {engine.index.describe(11)}"
    else:
        other = estimator.evaluate(engine, coords, 3, range(n))  # a function of the step
        assert not torch.equal(whole, other)


def test_an_estimator_that_is_none_is_named():
    with pytest.raises(InputError, match=r"zo\.estimator = math:sqrt: expected a subclass of"):
        make_estimator(Zo(estimator="math:sqrt"), 0)
    with pytest.raises(
        InputError, match=r"zo.estimator = 'fga': expected 'cge', 'rge', 'fzoo', 'autograd', .* or 'package.module:Class'"
    ):
        config.parse({"zo": {"estimator": "fga"}}, "input")


def test_the_names_of_estimators_are_those_of_the_input():
    assert tuple(ESTIMATORS) == sections.ESTIMATORS
    assert all(make_estimator(Zo(estimator=name), 0) for name in ESTIMATORS)


def budget(limit=None, **stop):
    stop = {"epochs": 2.0, "steps": None, "queries": None, "target_accuracy": None} | stop
    keys = {"stop": stop, "task": {"max_queries": limit}, "optim": {"tries": False}}
    task = SimpleNamespace(
        config=SimpleNamespace(**{name: SimpleNamespace(**values) for name, values in keys.items()}),
        steps_per_epoch=5, cost=Cost(bind=2, query=3, evaluation=4),
    )  # fmt: skip
    pattern = SimpleNamespace(coords=range(10), ahead=lambda step: (50, 10))
    return Budget(task, make_estimator(Zo(estimator="cge"), 0), pattern)


def test_a_step_asks_for_its_base_and_for_each_coordinate():
    assert budget().of_step(10) == 2 + 10 * 3


@pytest.mark.parametrize(
    ("made", "step", "accuracy", "reason"),
    [
        (budget(), 9, math.nan, Reason.NONE),
        (budget(), 10, math.nan, Reason.EPOCHS),
        (budget(steps=3), 3, math.nan, Reason.STEPS),
        (budget(target_accuracy=0.9), 3, 0.9, Reason.ACCURACY),
        (budget(target_accuracy=0.9), 3, math.nan, Reason.NONE),
        (budget(limit=85), 3, math.nan, Reason.MAX_QUERIES),  # 50 for scores, 32 for the step, 4 for an evaluation
        (budget(limit=86), 3, math.nan, Reason.NONE),
    ],
)
def test_the_limit_that_ends_a_run(made, step, accuracy, reason):
    assert made.reason(step, False, accuracy) == reason


def test_a_step_that_has_begun_needs_no_scores():
    assert budget(limit=36).reason(3, True, math.nan) == Reason.NONE
    assert budget(limit=35).reason(3, True, math.nan) == Reason.MAX_QUERIES


def test_the_first_line_tells_set_up_and_compilation_apart_and_neither_is_in_the_pace(monkeypatch):
    clock = iter([100.0, 143.0, 144.0, 145.0])
    monkeypatch.setattr(record.time, "monotonic", lambda: next(clock))
    progress = Progress(100, False, set_up_s=3.14)
    said = []
    progress.line = type("Line", (), {"say": lambda self, text: said.append(text())})()
    step = lambda k, seconds, compiled: Step(k, 0.1, 2.0, 0.1, 1.0, 10 * k, 10, seconds, 0.5, compiled, 0.0, 0)  # noqa: E731
    progress.show(step(1, 42.9, 42.0), 99, 0)
    assert said[0].endswith("11 queries/s comm 56% ETA 0:01:39 (set-up 3.1 s, compilation 42.0 s)")
    progress.show(step(2, 0.9, 0.0), 98, 0)
    progress.show(step(3, 0.9, 0.0), 97, 0)
    assert said[-1].endswith("ETA 0:01:37")


COSTLY = """
import numpy as np

seconds, asked = [0.0], []


class Loss:
    def initial(self):
        return np.linspace(0.1, 1, 8)

    def __call__(self, thetas, step):
        seconds[0] += 0.1 * len(thetas) + (0.0 if step in asked else 0.3)  # the first question of a step is a dear one
        if len(asked) < 2:
            seconds[0] += 2.0  # the first two steps are not like the others
        if step not in asked:
            asked.append(step)
        return ((thetas - 2) ** 2).sum(1)
"""
RUNS = {  # further keys, steps that are made
    "scores once": ({"sparsity.ratio": 0.5, "sparsity.q": 40}, 60),
    "scores anew": ({"sparsity.ratio": 0.5, "sparsity.q": 4, "sparsity.pattern": "regrasp", "sparsity.redraw_steps": 7}, 60),
    "few queries": ({"stop.queries": 9 * 30}, 30),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_end_of_a_run_is_forecast_from_its_tenth_step_on(name, tmp_path, monkeypatch):
    """A real run; but its clock is moved by the user's loss alone, so that the load of the machine does not matter."""
    (tmp_path / "costly.py").write_text(COSTLY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "costly", raising=False)
    keys, last = RUNS[name]
    keys = {"task.kind": "objective", "task.function": "costly:Loss", "sparsity.ratio": 0.0, "eval.every_epochs": 20} | keys
    settings = config.load(None, [f"{key}={value}" for key, value in (keys | {"stop.epochs": 60, "optim.lr": 0.01}).items()])
    task, said = make_task(settings, torch.device("cpu")), []
    seconds = importlib.import_module("costly").seconds
    for module in (record, trainer):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: seconds[0], perf_counter=lambda: seconds[0]))
    seconds_left = Progress.seconds_left

    def noted(self, *left):
        said.append((seconds[0], seconds_left(self, *left)))
        return said[-1][1]

    monkeypatch.setattr(Progress, "seconds_left", noted)
    monkeypatch.setattr(log.Line, "say", lambda self, text: text())
    folder = RunFolder(tmp_path / "run")
    folder.create()
    trainer.Trainer(World(), task, folder).run()
    assert len(said) == last
    for at, left in said[9:-3]:
        assert left == pytest.approx(said[-1][0] - at, rel=0.3)


NEWTON = ["optim.name=gauss-newton", "optim.adapt=true", "run.take_over=true"]
SHARDS = ["data.shards=2", "sparsity.redraw_steps=2", "sparsity.q=4"]


@pytest.mark.parametrize("more", [SHARDS, NEWTON, [*NEWTON, "sparsity.ratio=0.0"]], ids=["shards", "n < M", "M < n"])
def test_nothing_is_pickled_in_a_step(tmp_path, monkeypatch, more):
    """Collectives of Python objects cost the root time of every rank. A real run: a new S, new slices, replicas compared."""
    keys = ["data.name=digits", "data.batch_size=24", "data.augment=false", "data.train_limit=48", "model.name=cnn"]
    keys += ["model.depth=1", "zo.engine=reuse", "run.check_every=1", "stop.steps=5", *more]
    pickled = []
    for name in ("bcast", "gather", "allgather"):
        whole = getattr(World, name)
        monkeypatch.setattr(World, name, lambda self, *a, w=whole, n=name: (pickled.append(n), w(self, *a))[1])
    step, counts = trainer.Trainer._train_step, []

    def spied(self, *args):
        before = len(pickled)
        step(self, *args)
        counts.append(len(pickled) - before)

    monkeypatch.setattr(trainer.Trainer, "_train_step", spied)
    folder = RunFolder(tmp_path / "run")
    folder.create()
    trainer.Trainer(World(), make_task(config.load(None, keys), torch.device("cpu")), folder, quiet=True).run()
    assert counts == [0] * 5 and pickled  # outside of steps they do


def test_a_restart_on_other_data_is_said(tmp_path, caplog):
    keys = ["data.name=digits", "data.batch_size=24", "data.augment=false", "model.name=cnn", "model.depth=1", "stop.steps=1"]
    task, folder = make_task(config.load(None, keys), torch.device("cpu")), RunFolder(tmp_path / "run")
    folder.create()
    trainer.Trainer(World(), task, folder, quiet=True).run()
    for changed in (False, True):
        caplog.clear()
        again = make_task(config.load(None, keys), torch.device("cpu"))
        if changed:  # an image of the test set, where it is looked at
            again.data.test.images[0, 0, 0, 0] += 1
        trainer.Trainer(World(), again, folder).restore(folder.newest_state()[1])
        assert ("data (SHA-256) was " in caplog.text) == changed


def test_evaluations_stay_on_record_where_a_restart_evaluates_less_often(tmp_path):
    keys = ["data.name=digits", "data.batch_size=24", "data.augment=false", "data.train_limit=48", "model.name=cnn"]
    keys += ["model.depth=1", "zo.estimator=autograd", "zo.engine=full", "sparsity.ratio=0"]
    folder = RunFolder(tmp_path / "run")
    folder.create()
    for steps, every in ((3, 1), (5, 2), (9, 4)):  # of two an epoch; the last evaluations, after 3 and 5, were due at no interval
        task = make_task(config.load(None, [*keys, f"stop.steps={steps}", f"eval.every_epochs={every}"]), torch.device("cpu"))
        run = trainer.Trainer(World(), task, folder, quiet=True)
        if (state := folder.newest_state()[1]) is not None:
            run.restore(state)
        run.run()
    assert load_columns(folder.metrics)[1]["step"].tolist() == [2, 4, 8, 9]


ASKED = """
def classify(images):
    return -abs(images.mean((1, 2, 3))[:, None] - [0.1 * k for k in range(10)])
"""
CNN = ["model.name=cnn", "model.depth=1"]
DENOISER = ["task.kind=defense", "task.classifier=counted_box:classify", "model.name=dncnn", "model.depth=2", "model.width=2"]


@pytest.mark.parametrize(
    ("more", "ended_by"),
    [
        ([*CNN, "sparsity.pattern=regrasp", "sparsity.redraw_steps=2", "stop.steps=5"], "stop.steps"),  # scored three times
        ([*CNN, "stop.queries=1500"], "stop.queries"),
        (
            [*DENOISER, "eval.every_epochs=2", "data.test_limit=10", "sparsity.ratio=0.0", "task.max_queries=40000"],
            "task.max_queries",
        ),
    ],
)
def test_a_forecast_asks_what_the_run_asks(tmp_path, monkeypatch, more, ended_by):
    (tmp_path / "counted_box.py").write_text(ASKED)
    monkeypatch.syspath_prepend(tmp_path)
    keys = ["data.name=digits", "data.batch_size=24", "data.augment=false", "data.train_limit=48", "sparsity.q=4"]
    keys += ["zo.engine=full", "optim.lr=0.01", "zo.mu=1e-3", "checkpoint.every_steps=2", *more]
    task, again = (make_task(config.load(None, keys), torch.device("cpu")) for _ in range(2))
    folder = RunFolder(tmp_path / "run")
    folder.create()
    run = trainer.Trainer(World(), task, folder, quiet=True)
    run.run()
    again.bind(0)
    found = Forecast(again, every=False)
    assert (found.steps, found.ended_by) == (run.state.step, ended_by)
    assert found.per_step * found.steps + found.scores + found.asked == run.budget.queries
    one = found.model.step(1, 1)
    seconds = found.steps * one.seconds + found.steps // 2 * found.checkpoint_s
    seconds += (3 if ended_by == "stop.steps" else 1) * sum(found.scoring_s)
    assert found.checkpoint_s > 0 and (found.scoring_s[1] > 0) == (found.scores > 0)
    assert seconds < found.run_s(one) < 2 * seconds  # there are evaluations, too
