"""Ask and tell: the numbers of the trainer, to the last bit; saved in mid-step; the optimiser with a closure."""

import copy
import io

import numpy as np
import pytest
import torch

import dzhpc
from dzhpc import config
from dzhpc.errors import CheckpointError, InputError, NumericalError
from dzhpc.files.checkpoint import load_checkpoint
from dzhpc.files.runfolder import RunFolder
from dzhpc.job.world import World
from dzhpc.optim import ZO
from dzhpc.tasks import make_task
from dzhpc.training.trainer import Trainer

MODULE = """
import numpy as np
class Loss:
    def initial(self):
        return {"a": np.linspace(-1, 1, 5), "b": np.full((2, 3), 0.5)}
    def __call__(self, thetas, step):
        return [float(((t**2 - 1) ** 2).sum() + np.sin(t * np.arange(1, 12)).sum()) for t in thetas]
"""
THETA0 = {"a": np.linspace(-1, 1, 5), "b": np.full((2, 3), 0.5)}


def losses(thetas):
    return [float(((t**2 - 1) ** 2).sum() + np.sin(t * np.arange(1, 12)).sum()) for t in np.asarray(thetas)]


KINDS = {
    "cge-adam": ({"estimator": "cge", "optimizer": "adam"}, {}),
    "rge-sgd": ({"estimator": "rge", "optimizer": "sgd"}, {"zo.q": 7, "optim.momentum": 0.5}),
    "central-cosine": ({"estimator": "cge"}, {"zo.difference": "central", "optim.schedule": "cosine", "stop.epochs": 8.0}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [None, 1, 4])
def test_the_steps_are_those_of_train_to_the_last_bit(tmp_path, monkeypatch, kind, limit):
    (tmp_path / "asked.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    options, keys = KINDS[kind]
    loop = dzhpc.Loop(THETA0, mu=1e-3, lr=0.01, seed=3, keys=keys, **options)
    found, random = [], torch.get_rng_state()
    while not loop.done(steps=8):
        thetas = loop.ask(limit)
        assert thetas.shape[1] == 11 and (limit is None or len(thetas) <= limit)
        loop.tell(losses(thetas))
        if not found or found[-1] != (loop.step, loop.loss):
            found += [(loop.step, loop.loss)] if loop.step else []
    assert torch.equal(random, torch.get_rng_state())
    table = loop.config.model_dump(exclude_none=True) | {"task": {"kind": "objective", "function": "asked:Loss"}}
    table["stop"]["steps"] = 8
    folder = RunFolder(tmp_path / "run")
    folder.create()
    trainer = Trainer(World(), make_task(config.parse(table, "x"), torch.device("cpu")), folder, quiet=True)
    trainer.run()
    written = [(int(row[0]), row[2]) for row in trainer._record._metrics.train]
    assert found == written and len(written) == 8
    for name, tensor in trainer.task.model.named_parameters():
        assert loop.theta[name].tobytes() == tensor.detach().numpy().tobytes()
    evaluations = 8  # of the trainer, one a step
    assert loop.queries == trainer.budget.queries - evaluations == 8 * len(loop.ask())


def test_a_saved_loop_goes_on_in_the_middle_of_a_step(tmp_path):
    whole, first = dzhpc.Loop(np.zeros(6), lr=0.1), dzhpc.Loop(np.zeros(6), lr=0.1)
    square = lambda thetas: ((thetas - 1) ** 2).sum(1)  # noqa: E731
    while not whole.done(3):
        whole.tell(square(whole.ask()))
    first.tell(square(first.ask()))
    for _ in range(3):
        first.tell(square(first.ask(limit=2)))
    first.save(tmp_path / "loop.h5")
    found = load_checkpoint(tmp_path / "loop.h5")
    assert found.step == 1 and found.partial.done.tolist() == [True] * 5 + [False]
    again = dzhpc.Loop(np.zeros(6), lr=0.1)
    again.load(tmp_path / "loop.h5")
    assert len(again.ask()) == 2  # the base, and the one coordinate that is not known
    while not again.done(3):
        again.tell(square(again.ask()))
    assert again.theta.tobytes() == whole.theta.tobytes() and again.loss == whole.loss
    assert again.queries == whole.queries == 21
    with pytest.raises(CheckpointError, match=r"zo\.mu"):
        dzhpc.Loop(np.zeros(6), mu=0.1, lr=0.1).load(tmp_path / "loop.h5")


def test_theta_comes_and_goes_as_it_was_given():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    loop = dzhpc.Loop(net, lr=0.1)
    thetas = loop.ask()
    assert isinstance(thetas, torch.Tensor) and thetas.shape == (14, 13)
    blocks = loop.split(thetas)
    assert list(blocks) == ["0.weight", "0.bias", "1.weight", "1.bias"] and blocks["0.weight"].shape == (14, 3, 2)
    before = net[0].bias.detach().clone()
    loop.tell((blocks["0.bias"] ** 2).sum(1))
    assert not torch.equal(net[0].bias, before) and loop.theta is net
    assert isinstance(dzhpc.Loop(torch.zeros(3)).ask(), torch.Tensor)
    assert dzhpc.Loop([0.0, 1.0]).ask().shape == (3, 2)


def test_what_cannot_work_is_said(caplog):
    loop = dzhpc.Loop(np.zeros(3))
    with pytest.raises(InputError, match=r"tell\(\) got losses \[1\] for the 0 thetas of ask\(\)"):
        loop.tell([1.0])
    assert len(loop.ask()) == 4 and loop.ask().tobytes() == loop.ask().tobytes()
    with pytest.raises(InputError, match=r"tell\(\) got losses \[3\] for the 4 thetas .* one for each, to be minimised"):
        loop.tell([1.0, 2.0, 3.0])
    with pytest.raises(InputError, match=r"tell\(\) got .*expected a loss for each theta, to be minimised"):
        loop.tell([None] * 4)
    with pytest.raises(NumericalError, match=r"step 1: the difference at .*coordinate 1"):
        loop.tell([0.0, 1.0, np.nan, 1.0])
    for base in (np.nan, np.inf):  # and the step may be asked for again
        assert len(loop.ask()) == 4
        with pytest.raises(NumericalError, match=r"step 1: the loss at theta is .*; look at the loss, and at theta"):
            loop.tell([base] * 4)
    loop.ask()
    loop.tell([1.0, 2.0, 3.0, 4.0])
    assert loop.step == 1
    for limit in (0, 1.5, "2"):
        with pytest.raises(InputError, match=r"ask\(limit=.*\): expected a whole number of at least 1"):
            loop.ask(limit=limit)
    lost = dzhpc.Loop(np.zeros(2), lr=1.0, mu=0.5)
    lost.ask()
    lost.tell([0.0, np.inf, 1.0])
    assert lost.theta.tolist() == [0, -2]
    for options, said in (({"estimator": "autograd"}, "has no autograd"), ({"keys": {"zo.muh": 1}}, "did you mean zo.mu"),
                          ({"keys": {"task.kind": "sol"}}, "expected SECTION.KEY of"), ({"mu": -1.0}, "zo.mu"),
                          ({"keys": {"data.shards": 2}}, "data.shards: there is no batch to cut")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            dzhpc.Loop(np.zeros(2), **options)
    with pytest.raises(InputError, match="theta0 is none"):
        dzhpc.Loop(np.array([1j]))


def test_an_optimiser_with_a_closure_makes_the_same_steps():
    torch.manual_seed(1)
    x = torch.randn(20, 2)
    net = torch.nn.Linear(2, 1).double()
    target = x.double() @ torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    optimizer = ZO(net.named_parameters(), lr=0.1, mu=1e-5, seed=np.int64(0), keys={"optim.momentum": 0.5})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    other = torch.nn.Linear(2, 1).double()
    other.load_state_dict(net.state_dict())
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.5)
    halving = torch.optim.lr_scheduler.StepLR(plain, 2, 0.5)
    for _ in range(4):
        loss = optimizer.step(lambda: ((net(x.double()) - target) ** 2).mean())
        scheduler.step()
        plain.zero_grad()
        exact = ((other(x.double()) - target) ** 2).mean()
        exact.backward()
        plain.step()
        halving.step()
        assert loss == pytest.approx(exact.item(), rel=1e-4)
    torch.testing.assert_close(net.weight, other.weight, rtol=1e-3, atol=1e-4)
    assert optimizer.loop.step == 4 and optimizer.loop.queries == 16


def test_a_closure_that_raises_leaves_nothing_of_its_batch_for_the_next_one():
    theta = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer, batches = ZO([theta], lr=0.1, mu=1e-6), iter([5.0, 5.0, None, 0.0, 0.0, 0.0])

    def closure():
        if (batch := next(batches)) is None:
            raise KeyboardInterrupt
        return theta.square().sum() + 1000 * batch

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert theta.tolist() == [1.0, -2.0]
    assert optimizer.step(closure) == pytest.approx(5.0)
    torch.testing.assert_close(theta.detach(), torch.tensor([0.8, -1.6], dtype=torch.float64), rtol=1e-4, atol=0)


def test_keys_that_a_loop_does_not_follow_are_named(caplog):
    keys = {"zo.q": 3, "stop.steps": 4, "stop.epochs": 3.0, "optim.momentum": 0.5, "optim.schedule": "cosine"}
    dzhpc.Loop(np.ones(3), keys=keys)
    assert caplog.messages == ['zo.q: no effect with zo.estimator = "cge"', "stop.steps: no effect with dzhpc.Loop"]


def test_the_optimisers_state_dict_goes_on_as_torchs_does():
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)

    def made():
        torch.manual_seed(1)
        net = torch.nn.Linear(3, 1).double()
        optimizer = ZO(net.parameters(), mu=1e-5, estimator="rge", optimizer="adam", keys={"zo.q": 3})
        return net, optimizer, lambda: (net(x) - 1).square().mean()

    net, optimizer, closure = made()
    for _ in range(2):
        optimizer.step(closure)
    optimizer.param_groups[0]["lr"] = 0.05
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    other, again, asked = made()
    found = torch.load(file, weights_only=True)
    other.load_state_dict(found["net"]), again.load_state_dict(found["optimizer"])
    for _ in range(2):
        optimizer.step(closure), again.step(asked)
    assert torch.equal(net.weight, other.weight) and again.loop.step == 4 and again.loop.queries == optimizer.loop.queries == 16
    for wrong, said in ((lambda: again.load_state_dict(torch.optim.Adam(other.parameters()).state_dict()), "of a dzhpc.optim.ZO"),
                        (lambda: again.add_param_group({"params": [torch.ones(1)]}), "has one group"),
                        (lambda: copy.deepcopy(again), "cannot be copied"),
                        (lambda: again.step(lambda: None), "gave NoneType; expected the loss, one number"),
                        (lambda: again.step(lambda: net.weight[0]), r"gave a tensor \[3\]; expected the loss, one number"),
                        (lambda: again.step(lambda: asked().backward()), "needs none")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            wrong()


def test_the_first_estimate_checks_itself(caplog):
    single = lambda thetas: np.float32(((thetas - 1) ** 2).sum(1) + 9)  # noqa: E731
    loop = dzhpc.Loop(np.zeros(4), mu=1e-6, check=True)
    with caplog.at_level("INFO", "dzhpc"):
        assert len(loop.ask()) == 5 + 6
        loop.tell(single(loop.ask()))
    assert loop.queries == 5 and len(loop.ask()) == 5
    assert "first estimate: differences of " in caplog.text and "raise zo.mu to " in caplog.text
