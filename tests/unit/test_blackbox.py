"""A black box in the tail: few large calls, counted, checked, the same differences as one coordinate at a time."""

import asyncio
import copy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from delta_nets import DnCNN
from torch import nn

import dzhpc
from dzhpc import config
from dzhpc.engines import blackbox
from dzhpc.engines.blackbox import BlackBox, BlackBoxLoss
from dzhpc.errors import BlackBoxError, InputError, NumericalError
from dzhpc.tasks import make_task


def classifier():
    """A box that gives numpy and no gradient; it notes the size of each call."""
    weight, calls = torch.randn(3 * 8 * 8, 5).double().numpy(), []

    def answer(images):
        assert isinstance(images, np.ndarray)
        calls.append(len(images))
        return np.tanh(images.reshape(len(images), -1).astype(np.float64) @ weight)

    return answer, calls


def criterion(answers, labels):
    return F.cross_entropy(answers, labels, reduction="none")


@pytest.mark.parametrize("limit", [1000, 7])
def test_differences_through_a_box_equal_those_of_full_in_as_few_calls_as_the_limit_allows(limit):
    model, images, labels = DnCNN().double(), torch.randn(4, 3, 8, 8).double(), torch.randint(0, 5, (4,))
    function, calls = classifier()
    found = {}
    for kind in ("full", "delta"):
        box = BlackBox(function, limit, numpy=True)
        engine = dzhpc.make_engine(kind, copy.deepcopy(model), BlackBoxLoss(box, criterion))
        engine.bind(images, labels)
        coords = np.arange(0, engine.index.size, 37)
        asked = box.queries
        calls.clear()
        found[kind] = engine.differences(coords, 1e-3)
        if kind == "full":
            assert box.queries - asked == 4 * len(coords)
    assert float((found["delta"] - found["full"]).norm() / found["full"].norm()) < 1e-8
    assert box.queries - asked == sum(calls) == 4 * len(coords)
    assert max(calls) <= limit
    assert len(calls) == sum(-(-4 * len(chunk) // limit) for chunk in engine.cut(coords))


def test_the_last_layer_of_a_denoiser_in_fp32():
    """Absolute answers are subtracted, so digits are lost at the border, not before it."""
    model, images, labels = DnCNN(), torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))
    function, _ = classifier()
    truth = dzhpc.make_engine("full", copy.deepcopy(model).double(), BlackBoxLoss(BlackBox(function, numpy=True), criterion))
    engine = dzhpc.make_engine("delta", model, BlackBoxLoss(BlackBox(function, numpy=True), criterion))
    truth.bind(images.double(), labels)
    engine.bind(images, labels)
    coords = np.arange(engine.index.size - 200, engine.index.size)
    expected = truth.differences(coords, 5e-3)
    assert float((engine.differences(coords, 5e-3).double() - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda x: x[:-1], InputError, "gave \\[3, 2\\] for 4 inputs"),
        (lambda x: x.sum(), InputError, "gave \\[\\] for 4 inputs"),
        (lambda x: x * float("nan"), NumericalError, "not finite"),
        (lambda x: "no answer", InputError, "gave str; expected an array of numbers"),
        (lambda x: x * 1j, InputError, "gave complex numbers; expected real ones"),
        (lambda x: x.numpy().astype(complex), InputError, "gave complex numbers; expected real ones"),
        (lambda x: np.ma.masked_greater(x.numpy(), 0), InputError, "gave a masked array with masked entries; fill them"),
        (lambda x: [[1, 2], [3], [4], [5]], InputError, "gave list, which is no array"),
        (lambda x: np.array([1.0, None, 2, 3]), InputError, "gave ndarray of object; expected an array of numbers"),
    ],
)
def test_answers_that_cannot_be_right_are_named(answer, error, message):
    with pytest.raises(error, match=message):
        BlackBox(answer)(torch.ones(4, 2))


@pytest.mark.parametrize(
    "dtype", [">f8", "<f4", "f2", ">f4", "longdouble", "uint8", "uint16", "uint32", "uint64", ">i4", "bool", "object"]
)
def test_answers_of_any_width_and_byte_order_are_taken_by_their_value(dtype):
    x, back = torch.tensor([[1.0, 0], [0, 1]]), (slice(None), slice(None, None, -1))
    answers = BlackBox(lambda x: x.astype(dtype)[back], numpy=True)(x)
    assert answers.tolist() == [[0, 1], [1, 0]]
    assert torch.equal(answers.double(), x.flip(1).double())


def test_a_masked_array_without_masked_entries_is_an_array():
    assert BlackBox(lambda x: np.ma.masked_greater(x.numpy(), 5))(torch.ones(2, 1)).tolist() == [[1], [1]]


def test_the_box_never_sees_a_tensor_that_could_carry_a_gradient():
    seen = []
    box = BlackBox(lambda x: seen.append(x.requires_grad) or x.detach().numpy())
    box(nn.Parameter(torch.ones(3, 2)) * 2)
    assert seen == [False]
    with pytest.raises(InputError, match="batch_limit = 0"):
        BlackBox(len, 0)


class Moody:
    """Sums of its inputs, after it has failed a number of times; it spoils what it was given, and what it gave before."""

    def __init__(self, failures: int, error: BaseException | None = None):
        self.failures, self.error, self.calls, self.answers = failures, error or ConnectionError("busy"), 0, np.zeros(2)

    def __call__(self, inputs):
        self.calls += 1
        self.answers[: len(inputs)] = inputs.sum(1)
        inputs[:] = np.nan
        if self.failures:
            self.failures -= 1
            raise self.error
        return self.answers[: len(inputs)]


@pytest.fixture()
def waits(monkeypatch):
    """The seconds that a box would have waited; and its warnings are heard."""
    found = []
    monkeypatch.setattr(blackbox.time, "sleep", found.append)
    monkeypatch.setattr(blackbox.log, "propagate", True)
    return found


def test_a_call_that_fails_is_made_again_with_the_same_inputs_and_counted_once(waits, caplog):
    function, inputs = Moody(3), torch.arange(12.0).view(4, 3)
    box = BlackBox(function, 2, numpy=True, retries=3, name="the oracle")
    assert box(inputs).tolist() == [3.0, 12.0, 21.0, 30.0]
    assert (waits, function.calls, box.queries) == ([1, 2, 4], 5, 4)
    assert inputs.sum() == 66
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert caplog.messages[2].startswith("the oracle: ConnectionError: busy, at ")
    assert caplog.messages[2].endswith("in __call__; asking again in 4 s")


@pytest.mark.parametrize(("failures", "retries", "calls"), [(1, 0, 1), (8, 7, 8)])
def test_a_call_that_fails_for_good_is_named_and_waits_no_longer_than_the_longest(waits, failures, retries, calls):
    function = Moody(failures)
    box = BlackBox(function, numpy=True, retries=retries)
    with pytest.raises(BlackBoxError, match="^Moody: ConnectionError: busy, at .* in __call__" + " .attempt 8.$" * (calls > 1)):
        box(torch.ones(2, 3))
    assert (function.calls, box.queries, waits) == (calls, 0, [1, 2, 4, 8, 16, 30, 30][:retries])


def test_who_leaves_is_not_asked_again(waits):
    with pytest.raises(BlackBoxError, match="SystemExit: no license"):
        BlackBox(Moody(1, SystemExit("no license")), numpy=True, retries=3)(torch.ones(2, 3))
    with pytest.raises(KeyboardInterrupt):
        BlackBox(Moody(1, KeyboardInterrupt()), numpy=True, retries=3)(torch.ones(2, 3))
    with pytest.raises(BlackBoxError, match="Moody: CancelledError"):
        BlackBox(Moody(1, asyncio.CancelledError()), numpy=True, retries=3)(torch.ones(2, 3))
    assert waits == []


def test_answers_that_change_their_shape_are_named():
    box = BlackBox(lambda x: x[:, : 2 if x[0, 0] else 3], 2)
    with pytest.raises(InputError, match=r"gave \[2, 3\]; its earlier answers were \[2\] each"):
        box(torch.tensor([[1.0, 1, 1], [1, 1, 1], [0, 1, 1], [0, 1, 1]]))


MODULE = """
import numpy as np
import torch

asked = []


def images():
    draw = np.random.default_rng(0)
    part = lambda n: (draw.integers(0, 256, (n, 3, 4, 4)).astype(np.uint8), np.arange(n) % 2)
    return part(30), part(11)


def classify(x):
    asked.append(len(x))
    return x.mean((2, 3))[:, :2]
"""


@pytest.mark.parametrize("engine", ["full", "delta"])
def test_a_defence_costs_what_its_classifier_is_asked(tmp_path, monkeypatch, engine):
    (tmp_path / "own_box.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_box", raising=False)
    keys = ["task.kind=defense", "task.classifier=own_box:classify", "data.name=own_box:images", "data.batch_size=7"]
    keys += ["model.name=dncnn", "model.depth=3", "model.width=2", f"zo.engine={engine}", "eval.batch_size=4"]
    task = make_task(config.load(None, keys), torch.device("cpu"))
    task.bind(0)  # the first compares a trace with the model, too
    import own_box

    def asked(ask) -> int:
        own_box.asked.clear()
        ask()
        return sum(own_box.asked)

    assert asked(lambda: task.bind(1)) == task.cost.bind == 14
    assert asked(lambda: task.engine.differences(np.arange(40, 45), 1e-2)) == 5 * task.cost.query == 35
    assert asked(lambda: task.evaluate(range(task.evaluation_parts), 1)) == task.cost.evaluation == 22


def test_an_answer_that_depends_on_what_else_is_in_the_call_is_refused(caplog, monkeypatch):
    monkeypatch.setattr(blackbox.log, "propagate", True)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(288, 4))
    images = torch.rand(8, 3, 8, 8)
    box = BlackBox(lambda x: net(torch.from_numpy(x)).numpy(), numpy=True, name="cls:f")
    with pytest.raises(InputError, match=r"^cls:f: answers change, by \de-0[12] of their spread, .*training mode"):
        blackbox.check_company(box, images, most=0.02)
    noisy = BlackBox(lambda x: x + torch.rand(x.shape), name="cls:g")
    with pytest.raises(InputError, match=r"^cls:g: answers change, by .* with each call \(dropout"):
        blackbox.check_company(noisy, images, most=0.02)
    net.eval()
    blackbox.check_company(box, images, most=0.02)
    assert box.queries == 0 and caplog.messages == []
    blackbox.check_company(BlackBox(lambda x: x - 0.001 * x.mean(0), name="s"), images, most=0.02)
    assert "s: answers change, by 4e-04 of their spread" in caplog.text
    blackbox.check_company(BlackBox(lambda x: x[:, 0, 0, 0] * 0), images, most=0.0)
    blackbox.check_company(BlackBox(lambda x: 1 / x.mean(0)), images[:1], most=0.0)
