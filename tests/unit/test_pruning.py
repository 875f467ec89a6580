"""Pruning: scores, layer-wise ratios, patterns."""

import numpy as np
import pytest
import torch
from nets import Tied, tanh_net, vectors
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import dzhpc
from dzhpc import config
from dzhpc.engines.losses import LOSSES
from dzhpc.engines.pinned import seed
from dzhpc.errors import InputError, NumericalError
from dzhpc.files.lpr import save_lpr
from dzhpc.method import scores as pruning
from dzhpc.method.coordinates import ParameterIndex
from dzhpc.method.estimators import rge_slopes, rge_sum
from dzhpc.method.scores import LPR, adapted, running
from dzhpc.method.seeds import derive
from dzhpc.models.cnn import SimpleCNN
from dzhpc.models.resnet import resnet20
from dzhpc.tasks import make_task
from dzhpc.training.active_set import Pattern


def split_over(ranks):
    """A stand-in for World.split: every rank evaluates its own indices."""

    def split(n, evaluate):
        parts = [evaluate(range(rank, n, ranks)) for rank in range(ranks)]
        out = np.zeros(n, parts[0].dtype)
        for rank, part in enumerate(parts):
            out[rank::ranks] = part
        return out

    return split


def batch_norm_net():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)).double()


class Attention(nn.Module):
    """Fused attention, which has no second derivative of its own."""

    def __init__(self, attend=nn.functional.scaled_dot_product_attention):
        super().__init__()
        self.project, self.out, self.attend = nn.Linear(1, 12), nn.Linear(16, 4), attend

    def forward(self, x):
        q, k, v = self.project(x[:, None, :, None]).chunk(3, -1)
        return self.out(self.attend(q, k, v).flatten(1))


def bindable(model):
    x, y = vectors()
    engine = dzhpc.make_engine("reuse", model, "mse")
    return engine, lambda: engine.bind(x, y), x, y


@pytest.mark.parametrize(
    "make",
    [lambda: tanh_net(4, 5, 4), batch_norm_net, lambda: Attention().double()],
    ids=["plain", "BatchNorm in train mode", "attention"],
)
def test_fo_grasp_scores_are_minus_theta_times_hessian_times_gradient(make):
    model = make()
    engine, bind, x, y = bindable(model)
    index = engine.index
    theta = index.flatten(p.detach() for p in index.parameters)

    def loss(flat):
        return ((functional_call(model, index.split(flat), (x,)) - y) ** 2).mean()

    buffers = [b.clone() for b in model.buffers()]
    with torch.no_grad():
        functional_call(model, {}, (x,))
        once = [b.clone() for b in model.buffers()]
        [b.copy_(v) for b, v in zip(model.buffers(), buffers, strict=True)]
    scores = pruning.fo_grasp(engine, bind)
    assert [torch.equal(b, v) for b, v in zip(model.buffers(), once, strict=True)] == [True] * len(once)  # by the one bind
    with sdpa_kernel(SDPBackend.MATH):
        h, g = hessian(loss, theta), jacobian(loss, theta)
    assert torch.allclose(scores, -theta * (h @ g), rtol=1e-9, atol=1e-12)
    assert scores.norm() > 1e-3


def test_a_temperature_divides_the_outputs_before_they_are_scored():
    engine, bind, *_ = bindable(tanh_net(4, 5, 4))
    cool = pruning.fo_grasp(engine, bind, 200.0)
    engine.loss = lambda outputs, targets: LOSSES["mse"](outputs / 200, targets)
    torch.testing.assert_close(cool, pruning.fo_grasp(engine, bind), rtol=1e-12, atol=0)
    assert cool.abs().min() > 0


def test_fo_grasp_needs_a_second_derivative():
    fused = lambda *qkv: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*qkv)[0]  # noqa: E731
    engine, bind, *_ = bindable(Attention(fused).double())
    with pytest.raises(InputError, match=r"no gradient of Attention \(.*derivative for aten::_scaled_dot.* zo-grasp or random"):
        pruning.fo_grasp(engine, bind)


def test_zo_grasp_scores_correlate_with_fo_grasp_scores_given_many_directions():
    engine, bind, *_ = bindable(tanh_net(4, 3, 4))
    exact = pruning.fo_grasp(engine, bind)
    estimate = pruning.zo_grasp(engine, bind, 4000, 1e-3, 0, split_over(1))
    assert torch.corrcoef(torch.stack([exact, estimate]))[0, 1] > 0.95


def test_zo_grasp_is_equation_3_with_the_same_directions_in_both_estimates():
    model, q, mu = tanh_net(4, 3, 4), 6, 1e-2
    engine, bind, *_ = bindable(model)
    scores = pruning.zo_grasp(engine, bind, q, mu, 3, split_over(1))
    assert engine.queries == 2 * q + 2
    coords, seed = np.arange(engine.index.size), derive(3, "grasp")
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()

    def rge(at):
        nn.utils.vector_to_parameters(at, model.parameters())
        bind()
        return rge_sum(rge_slopes(engine, range(q), mu, seed, coords), seed, coords, engine.index)

    g = rge(theta)
    assert torch.allclose(scores, -theta * (rge(theta + mu * g) - g) / mu, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_zo_grasp_scores_do_not_depend_on_how_directions_are_shared_out(ranks):
    engine, bind, *_ = bindable(tanh_net(4, 3, 4))
    one, many = (pruning.zo_grasp(engine, bind, 5, 1e-2, 0, split_over(n)) for n in (1, ranks))
    assert torch.equal(one, many)


def test_only_conv_and_linear_weights_are_prunable():
    model = resnet20()
    layers = pruning.prunable_layers(model, ParameterIndex.of(model))
    assert len(layers) == 20
    assert sum(model.get_parameter(name).numel() for name in layers) == 268_336
    assert all(name.endswith(".weight") and ".bn" not in name for name in layers[1:])
    index = ParameterIndex.of(SimpleCNN(2))
    assert pruning.prunable_layers(SimpleCNN(2), ParameterIndex.of(SimpleCNN(2))) == []  # another module's parameters
    assert pruning.prunable_layers(nn.Identity(), index, "all") == index.names
    tied = Tied()
    assert pruning.prunable_layers(tied, ParameterIndex.of(tied)) == ["a.weight", "twice.weight"]


def layered(*sizes):
    return ParameterIndex({f"w{k}": torch.zeros(n) for k, n in enumerate(sizes)})


def test_signed_prunes_the_largest_scores_and_magnitude_the_smallest_absolute_ones_over_all_layers():
    index, scores = layered(4, 4), torch.tensor([5.0, -9, 1, -2, 8, 0.5, -3, 7])
    for rule, kept, active in (("signed", [2, 2], [1, 3, 5, 6]), ("magnitude", [2, 2], [0, 1, 4, 7])):
        lpr = pruning.lpr_from_scores(scores, index, index.names, 0.5, rule, "sha")
        assert lpr.kept.tolist() == kept
        assert pruning.best(lpr, index).tolist() == active
        assert (lpr.attrs["rule"], lpr.attrs["sparsity"]) == (rule, 0.5)
    lopsided = pruning.lpr_from_scores(torch.tensor([9.0, 8, 7, 6, 0, 1, 2, 3]), index, index.names, 0.5, "signed", "sha")
    assert (lopsided.kept.tolist(), lopsided.ratios.tolist()) == ([1, 4], [0.75, 0])  # at least one stays


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 0.99])
def test_kept_counts_sum_to_the_asked_fraction_and_ratios_are_the_pruned_fractions(ratio):
    model = resnet20()
    index = ParameterIndex.of(model)
    layers = pruning.prunable_layers(model, index)
    lpr = pruning.lpr_from_scores(torch.randn(index.size), index, layers, ratio, "signed", "sha")
    assert lpr.kept.sum() == round((1 - ratio) * 268_336)
    assert np.allclose(lpr.kept, (1 - lpr.ratios) * lpr.sizes)
    assert lpr.sizes.tolist() == [model.get_parameter(name).numel() for name in layers]


def test_a_layer_keeps_at_least_one_coordinate_however_high_the_ratio():
    lpr = pruning.lpr_from_scores(torch.randn(1000), layered(990, 5, 5), ["w0", "w1", "w2"], 0.999, "signed", "sha")
    assert lpr.kept.min() == 1


def test_a_model_without_prunable_weights_is_refused():
    with pytest.raises(InputError, match="no conv or linear weight to prune"):
        pruning.lpr_from_scores(torch.zeros(4), layered(4), [], 0.5, "signed", "sha")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_a_numerical_failure(value):
    with pytest.raises(NumericalError, match="the pruning scores are not finite"):
        pruning.lpr_from_scores(torch.tensor([0.0, value, 1, 2]), layered(4), ["w0"], 0.5, "signed", "sha")


def some_lpr():
    return layered(20, 3, 30), LPR(["w0", "w2"], np.array([20, 30]), np.array([5, 1]), "sha")


def test_a_drawn_pattern_obeys_the_ratios_and_leaves_other_parameters_active():
    index, lpr = some_lpr()
    active = pruning.draw(lpr, index, seed=0, number=0)
    assert np.array_equal(active, np.unique(active))
    assert np.bincount(index.owner(active)).tolist() == [5, 3, 1]


def test_a_drawn_pattern_is_a_function_of_seed_and_number():
    index, lpr = some_lpr()
    first = pruning.draw(lpr, index, 3, 4).tolist()
    torch.rand(7)
    assert pruning.draw(lpr, index, 3, 4).tolist() == first
    others = [pruning.draw(lpr, index, *key).tolist() for key in ((3, 5), (4, 4), (4, 3))]
    assert len({tuple(s) for s in [first, *others]}) == 4
    twins = pruning.draw(LPR(["w0", "w1"], np.array([50, 50]), np.array([20, 20]), "sha"), layered(50, 50), 0, 0)
    assert (twins[:20] + 50).tolist() != twins[20:].tolist()  # layers of one size are drawn apart


def test_every_prunable_coordinate_is_drawn_equally_often():
    index, lpr = some_lpr()
    counts = np.bincount(np.concatenate([pruning.draw(lpr, index, 0, k) for k in range(800)]), minlength=53)
    assert np.abs(counts[:20] - 200).max() < 5 * (800 * 0.25 * 0.75) ** 0.5
    assert (counts[20:23] == 800).all()


def test_without_ratios_every_coordinate_is_active():
    assert pruning.draw(None, layered(3, 4), 0, 0).tolist() == list(range(7))


def digits_task(*overrides):
    base = ["data.name=digits", "data.augment=false", "data.batch_size=40", "model.name=cnn", "model.depth=1", "model.width=4"]
    return make_task(config.load(None, [*base, "sparsity.q=3", *overrides]), torch.device("cpu"))


def test_scoring_in_a_run_leaves_parameters_and_running_statistics_as_they_were():
    for scores in ("zo-grasp", "fo-grasp", "random"):
        task = digits_task(f"sparsity.scores={scores}")
        before = {name: t.clone() for name, t in task.model.state_dict().items()}
        lpr = Pattern(task, split_over(1)).score()
        assert all(torch.equal(before[name], t) for name, t in task.model.state_dict().items())
        assert lpr.layers == ["features.0.weight", "fc.weight"]
        assert lpr.attrs == {"scores": scores, "mu": 5e-3, "q": 3, "seed": 0, "rule": "signed", "sparsity": 0.9}


def steps_with_new_sets(pattern, steps):
    found = {}
    for step in range(steps):
        if pattern.due(step):
            pattern.redraw(step)
            found[step] = pattern.coords.tolist()
    return found


class Dropping(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 10))


def test_both_estimates_of_zo_grasp_see_one_dropout_mask():
    keys = ["data.name=digits", "data.batch_size=100", "data.augment=false", f"model.name={__name__}:Dropping", "zo.engine=full"]
    task = make_task(config.load(None, [*keys, "zo.mu=1e-3", "sparsity.q=600"]), torch.device("cpu"))
    found = Pattern(task, split_over(1)).score().scores.double()
    seed(derive(0, "score masks", 0))
    exact = pruning.fo_grasp(task.engine, lambda: task.bind_for_scores(0)).double()
    assert torch.cosine_similarity(found, exact, dim=0) > 0.6 and 0.5 < found.norm() / exact.norm() < 2


def test_dynamic_patterns_are_redrawn_at_their_interval_from_one_score_and_static_ones_never():
    dynamic = Pattern(digits_task("sparsity.redraw_steps=4"), split_over(1))
    sets = steps_with_new_sets(dynamic, 12)
    assert list(sets) == [0, 4, 8]
    assert len({tuple(s) for s in sets.values()}) == 3
    assert dynamic.queries == 2 * 3 + 2
    task = digits_task("sparsity.redraw_steps=4", "sparsity.pattern=static")
    static = Pattern(task, split_over(1))
    assert list(steps_with_new_sets(static, 12)) == [0]
    assert static.coords.tolist() == pruning.best(static.lpr, task.engine.index).tolist()
    anew = Pattern(digits_task("sparsity.redraw_steps=4", "sparsity.pattern=regrasp"), split_over(1))
    assert list(steps_with_new_sets(anew, 12)) == [0, 4, 8]
    assert anew.queries == 3 * (2 * 3 + 2)


def test_pruned_weights_are_exactly_zero_where_the_target_is_weights():
    task = digits_task("sparsity.target=weights", "sparsity.pattern=static")
    pattern = Pattern(task, split_over(1))
    before = task.engine.index.flatten(p.detach().clone() for p in task.engine.index.parameters)
    pattern.redraw(0)
    after = task.engine.index.flatten(p.detach() for p in task.engine.index.parameters)
    assert torch.equal(after[pattern.coords], before[pattern.coords])
    assert set((after != before).nonzero()[:, 0].tolist()) <= set(range(len(after))) - set(pattern.coords.tolist())
    assert (after == 0).sum() >= len(after) - len(pattern.coords)


def test_an_lpr_file_gives_the_same_sets_as_scoring_in_the_run_and_must_fit_model_ratio_and_pattern(tmp_path):
    task = digits_task()
    scored = Pattern(task, split_over(1))
    scored.redraw(0)
    path = tmp_path / "lpr.h5"
    save_lpr(path, scored.lpr, task.engine.index.split(scored.lpr.scores))
    for pattern in ("dynamic", "static"):
        read = Pattern(digits_task(f"sparsity.lpr={path}", f"sparsity.pattern={pattern}"), split_over(1))
        read.redraw(0)
        in_run = Pattern(digits_task(f"sparsity.pattern={pattern}"), split_over(1))
        in_run.redraw(0)
        assert read.coords.tolist() == in_run.coords.tolist()
        assert (read.queries, in_run.queries) == (0, 8)
    for wrong, message in (
        ("model.width=5", "made for another model"),
        ("sparsity.ratio=0.5", "made for sparsity 0.9, now .* 0.5"),
        ("sparsity.rule=magnitude", 'made by the rule "signed", now sparsity.rule = "magnitude"'),
        ("sparsity.prune=all", 'prunes 2 parameters, of which sparsity.prune = "all" and model.trainable make 6'),
    ):
        with pytest.raises(InputError, match=message):
            Pattern(digits_task(f"sparsity.lpr={path}", wrong), split_over(1)).redraw(0)
    save_lpr(path, scored.lpr)
    with pytest.raises(InputError, match=r'holds no scores, which pattern = "static" needs; use `python -m dzhpc.prune`'):
        Pattern(digits_task(f"sparsity.lpr={path}", "sparsity.pattern=static"), split_over(1)).redraw(0)


def test_an_adaptive_set_has_the_largest_coordinates_and_random_ones_in_each_layer():
    index = ParameterIndex({"a": torch.zeros(40), "b": torch.zeros(20), "c": torch.zeros(3)})
    lpr = LPR(["a", "b"], np.array([40, 20]), np.array([10, 6]), "")
    sizes = torch.zeros(63, dtype=torch.float64)
    sizes = running(running(sizes, np.array([3, 50]), torch.tensor([4.0, 1.0])), np.array([3, 7]), torch.tensor([2.0, 1.0]))
    assert (float(sizes[3]), float(sizes[7]), float(sizes[50])) == (3, 1, 1)
    sets = [adapted(lpr, index, 0, number, sizes, 0.2) for number in range(30)]
    for found in sets:
        assert {3, 7, 50, 60, 61, 62} <= set(found)
        assert (found < 40).sum() == 10 and (found < 60).sum() == 16 and len(set(found)) == len(found)
    assert len(set().union(*map(set, sets))) == 63  # all are tried
    assert any(7 not in adapted(lpr, index, 0, number, sizes, 0.1) for number in range(30))  # one place, and 3 has it
