"""Forward gradients: slopes are exact, estimates have the mean and the error that theory gives, noise stays where it belongs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import images, tanh_net
from torch import nn

import dzhpc
from dzhpc.config import Zo
from dzhpc.errors import InputError
from dzhpc.method.estimators import make_estimator, rge_slopes
from dzhpc.method.forward_gradient import changed, local_forward_gradient
from dzhpc.models.mixer import LocalMixer
from dzhpc.models.resnet import resnet20
from dzhpc.models.vit import ViT


def bound(model, batch, loss="cross_entropy"):
    engine = dzhpc.make_engine("full", model, loss)
    engine.bind(*batch)
    return engine


@pytest.mark.parametrize("make", [resnet20, lambda: ViT(2, 8, 2, 4, 16)])
def test_slopes_are_the_gradient_times_the_direction_and_nothing_moves(make):
    torch.manual_seed(0)
    x, y = images(16, 6)
    engine = bound(model := make().double().train(), (x.double(), y))
    u = torch.randn(3, engine.index.size).double()
    before, state = [t.clone() for t in model.state_dict().values()], torch.get_rng_state()
    found, queries = engine.slopes(u), engine.queries
    assert queries == 4
    torch.testing.assert_close(found, u @ engine.index.flatten(engine.gradient()), rtol=1e-11, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_the_estimate_is_unbiased_with_the_error_of_theory_and_the_limit_of_rge():
    torch.manual_seed(1)
    engine = bound(tanh_net(4, 5, 3), (torch.randn(9, 4).double(), torch.randn(9, 3).double()), "mse")
    g, d, q = engine.index.flatten(engine.gradient()), engine.index.size, 4
    estimator, coords = make_estimator(Zo(estimator="fg-w", q=q), 0), np.arange(engine.index.size)
    found = []
    for step in range(2000):
        slopes = estimator.evaluate(engine, coords, step, range(q))
        found.append(estimator.combine(engine, coords, step, slopes))
    found = torch.stack(found)
    sigma = found.std(0) / len(found) ** 0.5
    assert float(((found.mean(0) - g) / sigma).abs().max()) < 5
    error = float((found - g).square().sum(1).mean() / g.square().sum())
    assert error == pytest.approx((d + 1) / q, rel=0.05)
    assert estimator.units(7) == estimator.perturbations(7) == q and make_estimator(Zo(estimator="fg-w"), 0).units(7) == 1
    exact = estimator.evaluate(engine, coords, 0, range(q))
    for difference, order in (("forward", 1), ("central", 2)):
        along = [rge_slopes(engine, range(q), mu, estimator._seed(0), coords, difference) for mu in (2e-2, 1e-2)]
        coarse, fine = (float((slopes - exact).norm()) for slopes in along)
        assert coarse / fine == pytest.approx(2**order, rel=0.1)


def test_a_loss_without_a_forward_derivative_is_refused():
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    class Net(nn.Linear):
        def forward(self, x):
            return Own.apply(super().forward(x))

    batch = torch.randn(5, 4), torch.randn(5, 3)
    for engine in (bound(Net(4, 3), batch, "mse"), bound(nn.Linear(4, 3), batch, lambda out, y: torch.tensor(out.sum().item()))):
        with pytest.raises(InputError, match='"fg-w": no forward-mode derivative'):
            make_estimator(Zo(estimator="fg-w"), 0).check(engine)


def mixer(depth=2):
    torch.manual_seed(2)
    model = LocalMixer(depth, 8, 2, 2, 4, 3, 1).double()
    nn.init.normal_(model.final.weight)
    return model, torch.randn(6, 1, 4, 4).double(), torch.randint(0, 3, (6,))


def test_the_mixers_of_the_paper_have_its_numbers_of_parameters():
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    with torch.device("meta"):
        assert count(LocalMixer()) == 918_770
        assert count(LocalMixer(width=2048, groups=64)) == 13_074_674


def test_patches_are_those_of_the_image():
    model, x, _ = mixer()
    assert torch.equal(model.patches(x)[:, 1], x[:, 0, :2, 2:].flatten(1))  # row 0, column 1


def local_losses(model, x, y):
    """The greedy gradient by back-propagation: {name: gradient}, the last head's at its rate."""
    h, total = model.patches(x), 0
    for block, head in zip(model.blocks, model.heads, strict=True):
        h = block(h.detach())
        total = total + F.cross_entropy(head(h.mean(1)), y)
    total = total + 0.1 * F.cross_entropy(model.final(h.detach().mean(1)), y)
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(total, list(model.parameters())), strict=True))


def test_local_estimates_have_the_local_losses_gradient_as_their_mean_and_heads_are_exact():
    model, x, y = mixer()
    exact, draws, copies = local_losses(model, x, y), 80, 50  # of the batch, each with noise of its own
    x, y = x.repeat(copies, 1, 1, 1), y.repeat(copies)
    loss = lambda logits: F.cross_entropy(logits, y)  # noqa: E731
    many = {name: [] for name in exact}
    value, first = local_forward_gradient(model, x, loss, 1)
    assert float(value) == float(loss(model(x)).detach())
    for name in exact:
        if name.startswith(("heads", "final")):
            torch.testing.assert_close(first[name], exact[name], rtol=1e-12, atol=1e-14)
    for _ in range(draws):
        for name, g in local_forward_gradient(model, x, loss, 1)[1].items():
            many[name].append(g)
    worst, spread = 0.0, {}
    for name, values in many.items():
        if not name.startswith(("heads", "final")):
            values = torch.stack(values)
            sigma = values.std(0) / draws**0.5
            worst = max(worst, float(((values.mean(0) - exact[name]) / sigma.clamp_min(1e-12)).abs().max()))
            spread[name] = float(values.var(0).sum())
    assert worst < 5
    four = [local_forward_gradient(model, x, loss, 4)[1]["blocks.1.channel.weight"] for _ in range(40)]
    assert float(torch.stack(four).var(0).sum()) == pytest.approx(spread["blocks.1.channel.weight"] / 4, rel=0.2)


@pytest.mark.parametrize("frozen", ["heads", "blocks", "blocks.1", "final"])
def test_what_is_frozen_has_no_estimate_and_the_others_keep_theirs(frozen):
    model, x, y = mixer()
    loss = lambda logits: F.cross_entropy(logits, y)  # noqa: E731

    def estimate():
        draw = torch.Generator().manual_seed(3)
        return local_forward_gradient(model, x, loss, 1, lambda shape: torch.randn(shape, generator=draw))[1]

    whole = estimate()
    model.get_submodule(frozen).requires_grad_(False)
    found = estimate()
    assert list(found) == [name for name in whole if not name.startswith(f"{frozen}.")]
    torch.testing.assert_close(found, {name: whole[name] for name in found}, rtol=1e-12, atol=1e-15)


def test_the_change_of_a_block_is_a_finite_difference_and_noise_stays_in_its_patch_and_group():
    model, x, _ = mixer()
    x = model.patches(x)
    x = model.blocks[0](x).detach()
    block = model.blocks[1]
    shapes = [torch.zeros(6, 4, 8).double() for _ in range(3)]
    noises = [torch.randn_like(s) for s in shapes]

    def output(factor):
        h = x
        for stage, u in zip(block.stages(), noises, strict=True):
            h = stage.activation(stage.normalised(h) + factor * u, x)
        return h

    with torch.no_grad():
        slope = (output(1e-6) - output(-1e-6)) / 2e-6
    torch.testing.assert_close(changed(block, x, noises), slope, rtol=1e-5, atol=1e-6)
    patch = [torch.zeros_like(s) for s in shapes]
    patch[1][:, 2, :4] = noises[1][:, 2, :4]  # the channels' layer: patch 2, first group
    found = changed(block, x, patch)
    assert float(found[:, 2, :4].abs().max()) > 0
    found[:, 2, :4] = 0
    assert float(found.abs().max()) == 0


def test_parts_of_a_batch_add_up_for_given_noise():
    model, x, y = mixer()
    generator = torch.Generator().manual_seed(0)
    drawn = {}

    def noise_of(rows):
        calls = iter(range(100))

        def noise(shape):
            key = next(calls)
            if key not in drawn:
                drawn[key] = torch.randn(6, *shape[1:], generator=generator).double()
            return drawn[key][rows]

        return noise

    def estimate(rows):
        return local_forward_gradient(model, x[rows], lambda logits: F.cross_entropy(logits, y[rows]), 2, noise_of(rows))[1]

    whole, parts = estimate(slice(0, 6)), [estimate(slice(0, 2)), estimate(slice(2, 6))]
    for name, g in whole.items():
        torch.testing.assert_close(parts[0][name] / 3 + parts[1][name] * 2 / 3, g, rtol=1e-10, atol=1e-12)
