"""Gauss-Newton's bits depend neither on ranks nor on where a step was left; what it cannot take is one line."""

import numpy as np
import pytest
from mpi_launch import Case, assert_same, batch, bits, checkpoints, column, contents, sets

GN = sets(optim__name="gauss-newton", optim__lr=0.3, optim__momentum=0.5, optim__damping=0.1, optim__weight_decay=1e-3)
WAVES = ["objective.toml", *sets(task__function="userland:Waves", zo__mu=1e-5, task__retries=0, stop__steps=4), *GN]
STILL = sets(task__function="userland:Still", optim__adapt=True, optim__lr=1, optim__momentum=0, optim__weight_decay=0)
STATIC = sets(sparsity__ratio=0.5, sparsity__scores="random", sparsity__pattern="static")
DIGITS = ["digits.toml", *GN, *sets(stop__steps=4, optim__trust=0.5, optim__damping_kind="relative")]
CONFIGS = {
    "adapted": [*WAVES, *sets(optim__adapt=True, optim__damping_kind="marquardt")],
    "gradients": [*WAVES, *STATIC, *sets(optim__adapt=True, optim__average_gradient=0.5, optim__average_curvature=0.3)],
    "averaged": [*WAVES, *STATIC, *sets(optim__average_curvature=0.8, optim__average_gradient=0.5, zo__difference="central")],
    "digits": DIGITS,
    "sketched": [*DIGITS, *sets(sparsity__ratio=0.9, sparsity__scores="random", optim__sketch=2)],
    "adaptive": [*DIGITS, *sets(sparsity__pattern="adaptive", sparsity__measure="decrease", sparsity__ratio=0.8)],
    "regrasp": [*DIGITS, *sets(sparsity__pattern="regrasp", sparsity__ratio=0.8, optim__adapt=True, zo__engine="reuse")],
}
DOWN = {"column": "1 2 2", "bind": "1 2 0", "trial": "0 2 trial", "first": "1 0 4"}  # of "adapted", on two ranks


@pytest.fixture(scope="module")
def runs(place):
    train = lambda name, args, folder, **env: Case(name, "train", [*args, "--run-dir", folder], env)  # noqa: E731
    results = {}
    for ranks in (1, 2, 3):
        cases = [train(name, args, f"{ranks}/{name}") for name, args in CONFIGS.items()]
        if ranks == 2:
            cases += [train(f"down-{k}", CONFIGS["adapted"], f"down-{k}", DOWN=call) for k, call in DOWN.items()]
            cases.append(train("down-average", CONFIGS["gradients"], "down-average", DOWN=DOWN["trial"]))
        if ranks == 3:
            cases += [train(f"again-{k}", CONFIGS["adapted"], f"down-{k}") for k in DOWN]
            cases += [
                train("again-average", CONFIGS["gradients"], "down-average"),
                train("half", [*CONFIGS["averaged"], *sets(stop__steps=2)], "parted"),
                train("rest", CONFIGS["averaged"], "parted"),
                train("taken", [*DIGITS, *sets(run__take_over=True)], "taken"),
                train("half-adaptive", [*CONFIGS["adaptive"], *sets(stop__steps=2)], "parted-adaptive"),
                train("rest-adaptive", CONFIGS["adaptive"], "parted-adaptive"),
                train("scalar", ["objective.toml", *GN], "scalar"),
                train("rge", [*DIGITS, *sets(zo__estimator="rge")], "rge"),
                train("large", [*DIGITS, *sets(optim__memory_mb=0.01)], "large"),
                train("converged", [*WAVES, *STILL, *sets(stop__steps=30, stop__epochs=1000)], "converged"),
                train("limit", [*WAVES, *sets(optim__adapt=True, task__max_queries=60)], "limit"),
            ]
        results |= {(ranks, name): result for name, result in batch(ranks, place, cases).items()}
    return results


@pytest.mark.parametrize("name", CONFIGS)
def test_bits_are_equal_for_all_rank_counts(place, runs, name):
    for ranks in (1, 2, 3):
        runs[ranks, name].succeeded()
        assert_same(bits(place / "1" / name), bits(place / f"{ranks}/{name}"))
    loss = column(place / "1" / name, "train/loss")
    assert np.isfinite(loss).all() and len(set(loss)) == 4


def test_ranks_may_take_over_from_each_other(place, runs):
    runs[3, "taken"].succeeded()
    assert_same(bits(place / "1" / "digits", but=("config",)), bits(place / "taken", but=("config",)))


@pytest.mark.parametrize("where", DOWN)
def test_a_step_left_unfinished_goes_on_to_the_same_bits(place, runs, where):
    runs[2, f"down-{where}"].error(6, "no license left", "the same command continues from ")
    assert "restarting at step " in runs[3, f"again-{where}"].succeeded().out
    assert_same(bits(place / "1" / "adapted"), bits(place / f"down-{where}"))


def test_a_step_left_in_its_trials_averages_once(place, runs):
    runs[2, "down-average"].error(6, "no license left", "the same command continues from ")
    runs[3, "again-average"].succeeded()
    assert_same(bits(place / "1" / "gradients"), bits(place / "down-average"))


def test_averages_are_part_of_the_checkpoint(place, runs):
    runs[3, "rest"].succeeded()
    runs[3, "rest-adaptive"].succeeded()
    assert_same(bits(place / "1" / "adaptive"), bits(place / "parted-adaptive", but=("config-history",)))
    assert "coordinates/sizes" in contents(checkpoints(place / "parted-adaptive")[-1])
    assert_same(bits(place / "1" / "averaged"), bits(place / "parted", but=("config-history",)))
    found = contents(checkpoints(place / "parted")[-1])
    assert {f"optimizer/curvature/{k}" for k in ("hessian", "gradient", "coordinates", "damping")} <= set(found)


def test_what_it_cannot_take_is_one_line(place, runs):
    runs[3, "scalar"].error(2, "gives one number", "residuals(thetas, step) -> [P, m]")
    runs[3, "rge"].error(2, 'zo.estimator = "rge" gives no columns of the Jacobian')
    runs[3, "large"].error(2, "optim.memory_mb = 0.01", "MiB")


def test_trials_count_and_are_left_room_for(place, runs):
    """25 questions a step with its base, at most 8 for trials, 1 an evaluation."""
    assert "task.max_queries would be exceeded by the next step" in runs[3, "limit"].succeeded().out
    asked = column(place / "limit", "train/queries")
    assert 26 <= asked[0] <= 33 and asked[-1] <= 60 - 1


def test_a_minimum_asks_no_trials_and_lambda_stays_in_reach(place, runs):
    assert "no step is expected to lower the loss of its batch by more than 1e-10 of it" in runs[3, "converged"].succeeded().out
    asked = column(place / "converged", "train/queries")
    assert asked[-1] - asked[-2] == 26  # a base, 24 coordinates, an evaluation
    kept = contents(checkpoints(place / "converged")[-1])["optimizer/curvature/damping"]
    assert kept.endswith(np.float64(0.1).tobytes())  # that of the input
