"""The rivals of the paper: equal bits for all rank counts and after restarts; what they cannot take is one line."""

import pytest
from mpi_launch import Case, assert_same, attributes, batch, bits, checkpoints, column, sets, tensor

IDLE = sets(optim__momentum=0.0, optim__weight_decay=0.0, optim__schedule="constant", optim__warmup_epochs=0.0)
RANDOM = sets(sparsity__scores="random")
SEES = [*RANDOM, *sets(zo__engine="full", task__loss="mse")]
MIXER = [*RANDOM, *sets(model__name="local-mixer", model__groups=2, model__grid=2, model__image_size=8)]
EIGHT = ["--set", "model.name=userland:EachBatch"]
CONFIGS = {
    **{name: ("digits.toml", [*SEES, *sets(zo__estimator=name)]) for name in ("fa", "dfa", "align-ada", "align-zero")},
    "pattern": ("digits.toml", [*IDLE, *sets(zo__estimator="pattern", zo__mu=0.25, zo__q=90, sparsity__ratio=0.0)]),
    "fg-w": ("digits.toml", [*RANDOM, *sets(zo__estimator="fg-w", zo__q=5, zo__engine="full")]),
    "lg-fg-a": ("digits.toml", [*MIXER, *sets(zo__estimator="lg-fg-a", zo__q=2)]),
}
N, END = 2, 4
POLLED = ["objective.toml", *IDLE, *sets(task__function="userland:Outage", task__retries=0, zo__estimator="pattern", zo__mu=0.5)]
POLLED += sets(zo__q=24, stop__steps=5)
REFUSED = {
    "objective": (["objective.toml", *sets(zo__estimator="fa")], "has no autograd"),
    "no mixer": (["digits.toml", *sets(zo__estimator="lg-fg-a")], "model cnn has no blocks with heads"),
    "momentum": (["digits.toml", *CONFIGS["pattern"][1], *sets(optim__momentum=0.9)], "optim.momentum = 0.9"),
    "odd": (["digits.toml", *CONFIGS["pattern"][1], *sets(zo__q=7)], "zo.q = 7"),
    "one image": (["digits.toml", *sets(eval__batch_size=359), *EIGHT], "leaves one of 360 test images for the last pass"),
    "sparse": (["digits.toml", *CONFIGS["pattern"][1], *sets(sparsity__ratio=0.5)], "polls every coordinate"),
    "central": (["digits.toml", *sets(zo__estimator="dfa", zo__difference="central")], "takes none"),
}


@pytest.fixture(scope="module")
def done(place):
    """(folder, results): whole runs on one rank; halves on three, and their ends on two."""
    case = lambda name, folder, steps: Case(  # noqa: E731
        folder, "train", [CONFIGS[name][0], "--run-dir", folder, *CONFIGS[name][1], *sets(stop__steps=steps)]
    )
    refused = [Case(name, "train", [*args, "--run-dir", f"refused/{name}"]) for name, (args, _) in REFUSED.items()]
    whole = [*(case(name, f"{name}-whole", END) for name in CONFIGS), Case("polled", "train", [*POLLED, "--run-dir", "polled"])]
    results = batch(1, place, [*whole, *refused])
    left = Case("left", "train", [*POLLED, "--run-dir", "left"], {"DOWN": "1 2 1"})
    results |= batch(3, place, [*(case(name, f"{name}-half", N) for name in CONFIGS), left])
    rest = [
        Case(f"{name}-rest", "train", [CONFIGS[name][0], "--run-dir", f"{name}-half", *CONFIGS[name][1], *sets(stop__steps=END)])
        for name in CONFIGS
    ]
    return place, results | batch(2, place, [*rest, Case("left-rest", "train", [*POLLED, "--run-dir", "left"])])


@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_and_restarts_do_not_change_a_bit(done, name):
    place, results = done
    for part in ("whole", "half", "rest"):
        results[f"{name}-{part}"].succeeded()
    but = ("config", "metrics/eval")  # the half made an evaluation at its end
    assert_same(bits(place / f"{name}-whole", but), bits(place / f"{name}-half", but))
    losses = column(place / f"{name}-whole", "train/loss")
    assert len(losses) == END and len(set(losses)) == END


def test_a_poll_left_within_a_block_is_completed_to_the_same_bits(done):
    place, results = done
    assert results["left"].code == 6
    assert "step 3 left unfinished" in results["left"].out
    assert "completing step 3: " in results["left-rest"].succeeded().out
    assert_same(bits(place / "polled", ("config",)), bits(place / "left", ("config",)))


def test_queries_are_what_the_methods_ask(done):
    place, _ = done
    d = 4 * 9 + 4 + 8 + 4 * 4 * 9 + 4 + 8 + 4 * 10 + 10
    assert column(place / "pattern-whole", "train/queries") == [91 * k for k in range(1, END + 1)]
    assert d > 2 * 45  # no block of these is cut short
    assert column(place / "fg-w-whole", "train/queries") == [6 * k for k in range(1, END + 1)]
    assert column(place / "lg-fg-a-whole", "train/queries") == [3 * k for k in range(1, END + 1)]
    assert column(place / "dfa-whole", "train/queries") == list(range(1, END + 1))
    assert column(place / "pattern-whole", "train/lr") == [0.25] * END  # the radius


def test_a_checkpoint_holds_what_follows_from_nothing_else(done):
    place, _ = done
    newest = checkpoints(place / "align-ada-half")[-1]
    assert (tensor(newest, "estimator/fc.weight") != tensor(newest, "params/fc.weight")).any()
    polled = checkpoints(place / "pattern-whole")[-1]
    assert float(tensor(polled, "estimator/radius")) == 0.25 and int(tensor(polled, "estimator/poll")) + END > END
    assert attributes(polled, "state")["step"] == END


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_method_cannot_take_is_one_line(done, name):
    done[1][name].error(2, REFUSED[name][1])
