"""Optimisers and schedules: known values, and a restart at any step that changes nothing."""

import math

import pytest
import torch
from torch import nn

from dzhpc.config import Optim
from dzhpc.method import optimizers


def parameters():
    torch.manual_seed(1)
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    return {"weight": conv.weight, "bias": conv.bias, "gain": nn.Parameter(torch.tensor(2.0))}


def rates(section, epochs, steps_per_epoch, start=0, stop=None):
    """The learning rate used in each step."""
    optimizer = optimizers.make_optimizer(section, parameters())
    schedule = optimizers.make_schedule(optimizer, section, epochs, steps_per_epoch, start)
    found = []
    for _ in range(start, stop or round(epochs * steps_per_epoch) + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_warm_up_is_linear_and_cosine_falls_from_lr_to_0():
    found = rates(Optim(lr=0.4, warmup_epochs=2.0), epochs=10, steps_per_epoch=5)
    assert found[:10] == pytest.approx([0.04 * k for k in range(1, 11)])
    assert found[10:] == pytest.approx([0.2 * (1 + math.cos(math.pi * k / 40)) for k in range(41)])
    assert (found[10], found[30], found[50]) == (0.4, pytest.approx(0.2), pytest.approx(0))


def test_step_multiplies_by_gamma_at_each_milestone():
    section = Optim(lr=1.0, warmup_epochs=0.0, schedule="step", milestones=[2.0, 4.0], gamma=0.1)
    assert rates(section, 5, 3)[:15] == pytest.approx([1] * 6 + [0.1] * 6 + [0.01] * 3)


def test_a_constant_schedule_is_constant():
    assert rates(Optim(lr=0.3, warmup_epochs=0.0, schedule="constant"), 2, 4) == [0.3] * 9


def test_the_rate_never_exceeds_lr_with_a_fraction_of_an_epoch_of_warm_up():
    found = rates(Optim(lr=0.1, warmup_epochs=0.5), epochs=4, steps_per_epoch=7)
    assert found[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert max(found) <= 0.1


@pytest.mark.parametrize(
    "section",
    [
        Optim(warmup_epochs=1.5),
        Optim(schedule="step", milestones=[2.0, 3.5]),
        Optim(schedule="constant", warmup_epochs=0.0),
        Optim(name="adam"),
    ],
)
def test_a_restart_at_any_step_continues_the_same_rates(section):
    whole = rates(section, 5, 4)
    for start in (1, 5, 6, 7, 19):
        assert rates(section, 5, 4, start) == whole[start:]


def gradients(ps, step):
    draw = torch.Generator().manual_seed(step)
    for p in ps.values():
        p.grad = torch.randn(p.shape, generator=draw)


def train(ps, optimizer, schedule, steps):
    for step in steps:
        gradients(ps, step)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    "section", [Optim(), Optim(nesterov=True), Optim(momentum=0.0), Optim(name="adam"), Optim(name="muon", nesterov=True)]
)
def test_restored_slots_continue_to_the_same_bits(section):
    def start(step=0):
        ps = parameters()
        optimizer = optimizers.make_optimizer(section, ps)
        return ps, optimizer, optimizers.make_schedule(optimizer, section, 5, 4, step)

    ps, optimizer, schedule = start()
    train(ps, optimizer, schedule, range(6))
    slots = {s: {n: t.clone() for n, t in ts.items()} for s, ts in optimizers.slots(optimizer, ps).items()}
    values = {name: p.detach().clone() for name, p in ps.items()}
    expected = {
        "sgd": ["momentum_buffer"] if section.momentum else [],
        "adam": ["exp_avg", "exp_avg_sq", "step"],
        "muon": ["momentum_buffer"],
    }
    assert sorted(slots) == expected[section.name]
    assert all(list(names) == ["weight", "bias", "gain"] for names in slots.values())
    train(ps, optimizer, schedule, range(6, 12))

    again, optimizer, schedule = start(step=6)
    with torch.no_grad():
        for name, p in again.items():
            p.copy_(values[name])
    optimizers.restore(optimizer, again, {s: {n: t.contiguous() for n, t in ts.items()} for s, ts in slots.items()})
    train(again, optimizer, schedule, range(6, 12))
    assert all(torch.equal(ps[name], again[name]) for name in ps)
    for slot, tensors in optimizers.slots(optimizer, again).items():
        assert all(tensors[name].stride() == again[name].stride() for name in tensors if slot != "step")


def test_sgd_and_adam_take_the_known_first_step():
    for section, change in (
        (Optim(lr=0.1, momentum=0.9, weight_decay=0.5), -0.1 * (1 + 0.5 * 2)),
        (Optim(name="adam", lr=0.1, weight_decay=0.0), -0.1),
    ):
        p = nn.Parameter(torch.tensor([2.0]))
        p.grad = torch.tensor([1.0])
        optimizers.make_optimizer(section, {"p": p}).step()
        assert float(p.detach()) == pytest.approx(2 + change, rel=1e-6)


def test_muon_turns_a_kernel_by_an_orthogonal_matrix_and_leaves_the_rest_to_sgd():
    """The first step of a matrix G = U S V^T is about -lr sqrt(max(1, rows / columns)) U V^T, whatever S is."""
    ps = {name: p.detach().double().requires_grad_() for name, p in parameters().items()}
    before = {name: p.detach().clone() for name, p in ps.items()}
    for p in ps.values():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    section = Optim(name="muon", lr=0.03, lr_vectors=0.2, momentum=0.9, weight_decay=0.5)
    optimizers.make_optimizer(section, ps).step()
    moved = (ps["weight"] - (1 - 0.03 * 0.5) * before["weight"]).detach().flatten(1)
    u, _, v = torch.linalg.svd(ps["weight"].grad.flatten(1), full_matrices=False)
    parts = torch.diagonal(u.T @ moved @ v.T) / -0.03
    assert parts.min() > 0.6 and parts.max() < 1.3  # Newton-Schulz' singular values, in bfloat16
    assert torch.linalg.norm(moved + 0.03 * u @ torch.diag(parts) @ v) < 0.02 * torch.linalg.norm(moved)
    for name in ("bias", "gain"):
        torch.testing.assert_close(ps[name].detach(), before[name] - 0.2 * ps[name].grad)


@pytest.mark.parametrize("shape", [(4, 1, 3, 3), (4, 3, 1, 1), (1, 5), (3, 4, 5)])
def test_muon_does_not_see_how_a_kernel_lies_in_memory(shape):
    ends = []
    for layout in [torch.contiguous_format] + [torch.channels_last] * (len(shape) == 4):
        torch.manual_seed(2)
        p = nn.Parameter(torch.randn(shape).contiguous(memory_format=layout))
        optimizer = optimizers.make_optimizer(Optim(name="muon"), {"p": p})
        for step in range(3):
            gradients({"p": p}, step)
            optimizer.step()
        ends.append(p.detach())
    assert all(torch.equal(ends[0], end) for end in ends) and ends[0].isfinite().all()
