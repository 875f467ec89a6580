"""The bits of a coordinate depend neither on how many others are evaluated with it nor on which ones."""

import numpy as np
import pytest
import torch
from torch import nn

import dzhpc
from dzhpc.engines.kernels import compiled
from dzhpc.models.cnn import SimpleCNN


def alone_and_in_company(engine, counts) -> dict[int, set[float]]:
    """Coordinate -> all that was found for it, in chunks of so many coordinates of one parameter drawn at random."""
    random, found = np.random.default_rng(0), {}
    for owner in range(len(engine.index.names)):
        own = np.arange(engine.index.offsets[owner], engine.index.offsets[owner + 1])
        chosen = random.choice(own, min(3, len(own)), replace=False)  # these are in all chunks
        for count in (n for n in counts if n <= len(own)):
            kept = chosen[:count]
            others = random.choice(np.setdiff1d(own, kept), count - len(kept), replace=False)
            coords = random.permutation(np.concatenate([kept, others]))
            for j, value in zip(coords.tolist(), engine.differences(coords, 1e-2).tolist(), strict=True):
                if j in kept:
                    found.setdefault(j, set()).add(value)
    return found


@pytest.mark.parametrize(
    "compiles",
    [
        False,
        pytest.param(
            True,
            marks=[
                pytest.mark.long,
                pytest.mark.compiles,
                pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler"),
            ],
        ),
    ],
)
def test_no_company_of_1_to_64_changes_a_bit(compiles):
    torch.manual_seed(1)
    if compiles:
        first, last = [nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU()], [nn.Conv2d(8, 5, 3), nn.Flatten(), nn.Linear(320, 3)]
        model, x = nn.Sequential(*first, *last), (32, 2, 12, 12)
        first[1].requires_grad_(False)
        first[0].bias.requires_grad_(False)
    else:
        model, x = SimpleCNN(depth=2, width=8), (13, 3, 8, 8)
    engine = dzhpc.make_engine("delta", model, "cross_entropy", queries=float("inf") if compiles else 0)
    engine.bind(torch.randn(x), torch.randint(0, 3, x[:1]))
    made, programs = [], engine._kernels.programs
    compile_one = programs.compile
    programs.compile = lambda *given: made.append(given) or compile_one(*given)
    found = alone_and_in_company(engine, range(1, 65))
    assert {j: values for j, values in found.items() if len(values) > 1} == {}
    assert len({value for values in found.values() for value in values}) > len(found) // 2  # they are not all zero
    assert (0 < len(made) <= 5) if compiles else not made  # one program for all counts
    if compiles:
        assert engine.environment["compiled"] == "True"
