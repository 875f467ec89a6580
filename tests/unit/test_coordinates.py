"""Coordinates: the flat index, chunks that cover a set once, slices that are even."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import Tied, frozen
from torch import nn

from dzhpc.errors import InputError
from dzhpc.method.coordinates import ParameterIndex, balance, cut


def test_parameters_follow_in_their_order_tied_ones_once_and_frozen_ones_never():
    assert ParameterIndex.of(Tied()).names == ["a.weight", "a.bias", "b.bias", "twice.weight", "twice.bias"]
    index = ParameterIndex.of(frozen())
    assert index.names == ["0.bias", "2.weight", "2.bias"]
    assert (index.size, index.offsets.tolist()) == (29, [0, 5, 25, 29])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_element_is_the_row_major_entry_of_its_parameter_in_any_memory_layout(layout):
    conv = nn.Conv2d(3, 2, 3).to(memory_format=layout)
    index = ParameterIndex.of(conv)
    flat = index.flatten(p.detach() for p in index.parameters)
    assert [float(index.element(j)[1]) for j in range(index.size)] == flat.tolist()
    owner, element = index.element(29)
    element.fill_(7)
    assert (owner, conv.weight[1, 0, 0, 2].item()) == (0, 7)


def test_a_coordinate_is_described_by_parameter_and_place():
    assert ParameterIndex.of(nn.Conv2d(3, 2, 3)).describe(29) == "weight[1, 0, 0, 2] (coordinate 29)"


def test_split_undoes_flatten():
    index = ParameterIndex.of(nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last))
    pieces = index.split(index.flatten(p.detach() for p in index.parameters))
    assert list(pieces) == index.names
    assert all(torch.equal(piece, p) for piece, p in zip(pieces.values(), index.parameters, strict=True))


def test_coordinates_of_a_parameter_and_owners_of_coordinates_agree():
    index = ParameterIndex.of(Tied())
    for k, name in enumerate(index.names):
        assert index.owner(index.range(name)).tolist() == [k] * index.parameters[k].numel()


@pytest.mark.parametrize("coords", [[-1], [0, 44], [2**40]])
def test_a_coordinate_outside_is_refused(coords):
    with pytest.raises(InputError, match=r"outside 0\.\.43"):
        ParameterIndex.of(Tied()).owner(np.array(coords))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "no trainable parameter"),
        (
            {"a": torch.zeros(2), "b": torch.zeros(2).double()},
            r"one floating-point dtype, found \['torch.float32', 'torch.float64'\]",
        ),
        ({"a": torch.zeros(2, dtype=torch.int64)}, r"floating-point dtype, found \['torch.int64'\]"),
    ],
)
def test_parameters_that_cannot_be_perturbed_are_refused(parameters, message):
    with pytest.raises(InputError, match=message):
        ParameterIndex(parameters)


@given(st.lists(st.integers(0, 5), max_size=80), st.integers(1, 20))
def test_chunks_cover_every_position_once_and_never_cross_a_parameter(owners, size):
    owners = np.array(owners, int)
    chunks = cut(owners, size)
    assert [k for chunk in chunks for k in chunk] == list(range(len(owners)))
    assert all(len(set(owners[chunk])) == 1 and len(chunk) <= size for chunk in chunks)


def test_chunks_are_as_long_as_they_may_be():
    assert cut(np.array([0] * 7 + [1] * 3), 4) == [range(0, 4), range(4, 7), range(7, 10)]


@given(st.lists(st.floats(1e-6, 1e3), max_size=60), st.integers(1, 12))
def test_slices_cover_every_chunk_once_with_loads_that_differ_by_less_than_one_chunk(costs, ranks):
    slices = balance(costs, ranks)
    assert len(slices) == ranks
    assert sorted(k for part in slices for k in part) == list(range(len(costs)))
    loads = [sum(costs[k] for k in part) for part in slices]
    assert max(loads) - min(loads) <= max(costs, default=0) * (1 + 1e-9)


@given(st.lists(st.floats(0.5, 2), min_size=64, max_size=64), st.integers(2, 4))
def test_loads_of_many_similar_chunks_are_even_to_a_tenth(costs, ranks):
    loads = [sum(costs[k] for k in part) for part in balance(costs, ranks)]
    assert max(loads) / (sum(loads) / ranks) < 1.1


def test_the_longest_chunks_are_given_out_first():
    assert balance([1.0, 1, 1, 1, 4], 2) == [[4], [0, 1, 2, 3]]


def test_more_ranks_than_chunks_leave_some_slices_empty():
    assert sorted(balance([3.0, 1.0], 4)) == [[], [], [0], [1]]
    assert balance([], 2) == [[], []]


def test_gradients_that_are_kept_sparse_are_filled_up():
    table = nn.Embedding(5, 2, sparse=True)
    index = ParameterIndex.of(table)
    (gradient,) = torch.autograd.grad(table(torch.tensor([1, 3, 3])).sum(), index.parameters)
    assert gradient.is_sparse and index.flatten([gradient]).tolist() == [0, 0, 1, 1, 0, 0, 2, 2, 0, 0]


def test_elements_of_memory_that_two_coordinates_share_are_refused():
    flat, first = torch.randn(4, 6), nn.Linear(6, 4)
    ParameterIndex({"a": nn.Parameter(flat[:, :3]), "b": nn.Parameter(flat[:, 3:]), "none": nn.Parameter(torch.zeros(0))})
    with pytest.raises(InputError, match="the parameters a, b share memory; make one Parameter"):
        ParameterIndex({"a": nn.Parameter(flat[:, :3]), "b": nn.Parameter(flat[:, 2:])})
    with pytest.raises(InputError, match="the parameters weight, tied share memory"):
        ParameterIndex({"weight": first.weight, "tied": nn.Parameter(first.weight.t())})
    with pytest.raises(InputError, match="elements of the parameter w share memory"):
        ParameterIndex({"w": nn.Parameter(torch.randn(1, 6).expand(4, 6))})
