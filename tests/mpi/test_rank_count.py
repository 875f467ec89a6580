"""Bits do not depend on the number of ranks: parameters, buffers, optimiser state, S, ratios and every metrics column."""

import re

import numpy as np
import pytest
from mpi_launch import Case, assert_same, attributes, batch, bits, checkpoints, column, mpirun, sets, tensor

from dzhpc.job import processor

# large enough to be compiled, and of few programs
COMPILED = sets(zo__engine="delta", zo__compile="on", model__depth=1, model__width=16, data__batch_size=112, stop__steps=5)
CONFIGS = {
    "cge-dynamic": ("digits.toml", []),
    "cge-full-engine": ("digits.toml", sets(zo__engine="full", stop__steps=3)),
    "delta": ("digits.toml", COMPILED),
    "rge": ("digits.toml", sets(zo__estimator="rge", zo__q=5, sparsity__scores="random")),
    "central-adam": ("digits.toml", sets(zo__difference="central", optim__name="adam", optim__lr=0.01, sparsity__ratio=0.8)),
    "muon": ("digits.toml", sets(optim__name="muon", optim__lr=0.02, sparsity__ratio=0.8, stop__steps=4)),
    "regrasp": ("digits.toml", sets(sparsity__pattern="regrasp", sparsity__ratio=0.8)),
    "static-weights": ("digits.toml", sets(sparsity__pattern="static", sparsity__target="weights")),
    "fo-grasp": ("digits.toml", sets(sparsity__pattern="static", sparsity__scores="fo-grasp", stop__steps=3)),
    "autograd": ("digits.toml", sets(zo__estimator="autograd", sparsity__ratio=0.0, optim__nesterov=True)),
    "shards": ("digits.toml", sets(data__shards=4, stop__steps=4)),
    "shards-full": ("digits.toml", sets(data__shards=2, zo__engine="full", stop__steps=3)),
    "shards-rge": ("digits.toml", sets(data__shards=4, zo__estimator="rge", zo__q=5, sparsity__pattern="regrasp", stop__steps=4)),
    "shards-autograd": ("digits.toml", sets(data__shards=4, zo__estimator="autograd", stop__steps=3)),
    "data-of-the-root": (
        "own.toml",
        sets(model__name="userland:Sees", data__name="userland:noise_of_each_rank", data__train_limit=49_000, zo__engine="full")
        + sets(sparsity__ratio=0.9, stop__epochs=0.001, stop__steps=2),
    ),
    "dropout": ("own.toml", sets(model__name="userland:Dropout", zo__engine="full")),
    "objective": ("objective.toml", sets(stop__steps=10)),
    "two-coordinates": ("objective.toml", sets(sparsity__ratio=0.4, sparsity__scores="random", stop__steps=10)),  # on three ranks
    "objective-rge": (
        "objective.toml",
        sets(task__function="userland:Rings", zo__estimator="rge", zo__q=3, zo__mu=1e-3, sparsity__ratio=0.4, optim__lr=1e-3)
        + sets(sparsity__q=5, sparsity__redraw_steps=2, optim__name="adam", stop__steps=9),
    ),
}  # fmt: skip
FEWER = {"cge-full-engine", "muon", "data-of-the-root", "delta", "regrasp", "fo-grasp", "dropout", "objective-rge"}
RANKS = {name: (1, 3) if name in FEWER else (1, 2, 3) for name in CONFIGS}  # three is the hardest: slices of unequal size


@pytest.fixture(scope="module")
def launched(place):
    """Every configuration on 1, 2 and 3 ranks (RANKS), in folders RANKS/NAME; (the place, results by (RANKS, NAME)).

    "delta" is stopped on three ranks after two steps and goes on there.
    """
    results = {}
    for ranks in (1, 2, 3):
        chosen = {name: config for name, config in CONFIGS.items() if ranks in RANKS[name]}
        cases = [Case(name, "train", [file, "--run-dir", f"{ranks}/{name}", *args]) for name, (file, args) in chosen.items()]
        if ranks == 3:
            delta = next(case for case in cases if case.name == "delta")
            cases.insert(cases.index(delta), Case("delta-half", "train", [*delta.args, *sets(stop__steps=2)]))
            cases.append(Case("converged", "train", ["objective.toml", "--run-dir", "converged"]))
        results |= {(ranks, name): result for name, result in batch(ranks, place, cases).items()}
    return place, results


@pytest.fixture(scope="module")
def runs(launched):
    return launched[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_bits_are_equal_for_all_rank_counts(launched, name):
    runs, results = launched
    for ranks in RANKS[name]:
        results[ranks, name].succeeded()
    but = ("config", "metrics/eval") if name == "delta" else ()  # its half made an evaluation at its end
    alone = bits(runs / "1" / name, but)
    assert any(place.startswith("optimizer/") for place in alone)
    assert sum(place.startswith("metrics/train/") for place in alone) == 7 + 1  # columns but the two timings; rows
    for ranks in RANKS[name][1:]:
        assert_same(alone, bits(runs / str(ranks) / name, but))


def test_a_node_holds_its_data_once(runs):
    """Written down by the three ranks, each of which would have drawn data of its own."""
    found = []
    for rank in range(3):
        _, *segments = (runs / f"smaps.{rank}").read_text().split("memfd:dzhpc")
        found.append([int(re.search(rf"{kind}: +(\d+) kB", part)[1]) for part in segments for kind in ("Size", "Rss", "Pss")])
    assert all(len(one) == 3 for one in found)
    size, _, _ = found[0]
    assert size > 2 * 1024 * 0.9
    assert sum(pss for _, _, pss in found) < 0.5 * sum(rss for _, rss, _ in found)


@pytest.mark.long
@pytest.mark.skipif("bf16" not in processor.instruction_set(), reason="no bfloat16 products here: unit/test_delta_precision")
def test_bits_of_compiled_bf16_are_equal_for_all_rank_counts(place):
    narrow = sets(zo__precision="bf16", model__width=18)
    for ranks in (1, 3):
        words = ["digits.toml", "--run-dir", f"{ranks}/delta-bf16", *COMPILED, *narrow]
        batch(ranks, place, [Case("delta-bf16", "train", words)])["delta-bf16"].succeeded()
    assert_same(bits(place / "1" / "delta-bf16"), bits(place / "3" / "delta-bf16"))


def test_compiled_code_gives_the_same_bits_after_a_restart(launched):
    """Those of "delta" above, that is."""
    assert launched[1][3, "delta"].out.startswith("restarting at step 2 ")


def test_the_comparison_sees_a_difference(runs):
    # two configurations of one shape: everything that training touches must differ, or the tests above would see nothing
    a, b = bits(runs / "3" / "cge-dynamic"), bits(runs / "3" / "static-weights")
    different = {place for place in set(a) & set(b) if a[place] != b[place]}
    assert {"params/fc.weight", "coordinates/S", "metrics/train/loss", "optimizer/momentum_buffer/fc.weight"} <= different


def test_queries_are_what_the_estimator_says(runs):
    active = len(tensor(checkpoints(runs / "3" / "cge-dynamic")[-1], "coordinates/S"))
    d = 4 * 9 + 4 + 8 + 4 * 4 * 9 + 4 + 8 + 4 * 10 + 10  # the network of digits.toml
    assert active == d - round(0.5 * (4 * 9 + 4 * 4 * 9 + 4 * 10))
    assert column(runs / "3" / "cge-dynamic", "train/queries") == [14 + k * (1 + active) for k in range(1, 9)]
    assert column(runs / "3" / "rge", "train/queries") == [k * 6 for k in range(1, 9)]
    assert column(runs / "3" / "objective", "train/queries") == [5 * k - 1 for k in range(1, 11)]  # evaluations between
    assert len(tensor(checkpoints(runs / "3" / "two-coordinates")[-1], "coordinates/S")) == 2
    assert column(runs / "3" / "two-coordinates", "train/queries") == [4 * k - 1 for k in range(1, 11)]
    assert column(runs / "3" / "autograd", "train/queries") == list(range(1, 9))
    central = len(tensor(checkpoints(runs / "3" / "central-adam")[-1], "coordinates/S"))
    assert column(runs / "3" / "central-adam", "train/queries") == [14 + k * (1 + 2 * central) for k in range(1, 9)]


def test_the_set_is_redrawn_when_due(runs):
    sets_by_step = [tensor(p, "coordinates/S") for p in checkpoints(runs / "2" / "cge-dynamic")]  # steps 4, 6, 8
    assert [p.stem for p in checkpoints(runs / "2" / "cge-dynamic")] == ["step-00000004", "step-00000006", "step-00000008"]
    assert np.array_equal(sets_by_step[0], sets_by_step[1])  # drawn at step 3
    assert not np.array_equal(sets_by_step[1], sets_by_step[2])  # at step 6
    static = [tensor(p, "coordinates/S") for p in checkpoints(runs / "2" / "static-weights")]
    assert np.array_equal(static[0], static[2])


def test_pruned_weights_stay_zero(runs):
    newest = checkpoints(runs / "3" / "static-weights")[-1]
    weights = tensor(newest, "params/features.4.weight")
    lpr = dict(zip(tensor(newest, "lpr/layer").tolist(), tensor(newest, "lpr/kept").tolist(), strict=True))
    assert np.count_nonzero(weights) == lpr[b"features.4.weight"] < weights.size


def test_the_objective_converges(launched):
    place, result = launched[0], launched[1][3, "converged"].succeeded()
    theta = tensor(checkpoints(place / "converged")[-1], "params/theta")
    # the minimum of the quadratic, moved by the small sine: c_j (theta_j - t_j) 2 + 0.01 cos(theta_j) = 0
    residual = 2 * np.array([1.0, 2.0, 3.0]) * (theta - [0.3, -1.2, 2.0]) + 0.01 * np.cos(theta)
    assert np.abs(residual).max() < 0.02
    assert result.out.startswith("starting afresh in converged\n3 coordinates, 1 steps an epoch, until step 60\n")
    assert "stopped at step 60: all epochs done; 300 queries" in result.out
    assert (
        attributes(checkpoints(place / "converged")[-1], "state")["queries"] == 300
    )  # per step a base, three differences, an evaluation


def test_a_command_line_gives_the_bits_of_the_batch(runs):
    """The tests above run many command lines in one job; here is one of them as a user types it."""
    result = mpirun(2, "train", "digits.toml", "--run-dir", "typed", cwd=runs).succeeded()
    assert_same(bits(runs / "1" / "cge-dynamic"), bits(runs / "typed"))
    lines = result.out.splitlines()
    assert lines[0] == "starting afresh in typed"
    assert [line.split(":")[0] for line in lines if line.startswith("rank")] == ["ranks 0-1"]
    assert sum(line.startswith("step 1/8 epoch 0.1 loss ") and " ETA " in line for line in lines) == 1
    assert sorted(p.name for p in (runs / "typed").iterdir()) == [
        "checkpoints", "input.toml", "launches", "log.txt", "metrics.h5", "report",
    ]  # fmt: skip
