"""Shards of the batch on up to eight ranks: the bits of one rank, also where a step was left on another number of ranks."""

import numpy as np
import pytest
from mpi_launch import Case, assert_same, batch, bits, checkpoints, column, contents, sets, tensor

pytestmark = pytest.mark.long
CONTINUED = {2: 3, 3: 8, 8: 5}  # ranks on which a step is left -> ranks that complete it
SMALL = ["digits.toml", *sets(stop__steps=2, run__deadline_margin=0.01, sparsity__scores="random", checkpoint__every_steps=9)]
KINDS = {
    "delta": sets(zo__estimator="userland:LeftCGE", zo__engine="delta", zo__memory_mb=0.175, sparsity__ratio=0.3),
    "full": sets(zo__estimator="userland:LeftCGE", zo__engine="full", sparsity__ratio=0.95),
    "rge": sets(zo__estimator="userland:LeftRGE", zo__engine="delta", zo__q=25),
}
CASES = {f"{kind}-{n}": [*SMALL, *args, *sets(data__shards=n)] for kind, args in KINDS.items() for n in (1, 2, 4)}
CASES |= {
    "more-shards-than-ranks": [*SMALL, *KINDS["delta"], *sets(data__shards=12, data__train_limit=101, data__batch_size=24)],
    "shards-of-two": [*SMALL, *KINDS["rge"], *sets(data__shards=7, data__train_limit=100, data__batch_size=14)],
    "taken-over": [*SMALL, *KINDS["delta"], *sets(data__shards=3, run__take_over=True)],
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(place):
    """Whole runs on one rank; the same left in their second step, and how far that was; the rest of those."""
    case = lambda what, folder, name, **env: Case(f"{what}-{name}", "train", [*CASES[name], "--run-dir", f"{folder}/{name}"], env)  # noqa: E731
    results, known = batch(1, place, [case("whole", "1", name) for name in CASES]), {}
    for ranks, others in CONTINUED.items():
        left = batch(ranks, place, [case("left", ranks, name, LEAVE="1") for name in CASES])
        files = {name: checkpoints(place / str(ranks) / name)[-1] for name in CASES}
        known |= {(ranks, name): tensor(file, "partial/done") for name, file in files.items() if "partial/done" in contents(file)}
        rest = batch(others, place, [case("rest", ranks, name) for name in CASES])
        results |= {(ranks, name): result for name, result in (left | rest).items()}
    return results, known


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_one_rank(place, runs, name):
    results, known = runs
    results[f"whole-{name}"].succeeded()
    alone = bits(place / "1" / name)
    assert np.isfinite(column(place / "1" / name, "train/loss")).all()
    for ranks in CONTINUED:
        assert results[ranks, f"left-{name}"].code == 75, results[ranks, f"left-{name}"].err
        assert 0 < known[ranks, name].sum() < len(known[ranks, name])
        assert "completing step 2: " in results[ranks, f"rest-{name}"].succeeded().out
        assert_same(alone, bits(place / str(ranks) / name))
