"""Partitions are the best there are."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_pipe.model.partition import balanced, uniform


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=7), st.integers(1, 4))
def test_no_division_has_a_smaller_largest_part(weights, parts):
    bounds = balanced(weights, parts)
    assert bounds[0] == 0 and bounds[-1] == len(weights) and bounds == sorted(bounds)
    largest = max(sum(weights[a:b]) for a, b in itertools.pairwise(bounds))
    least = len(weights) >= parts
    every = (
        (0, *inner, len(weights))
        for inner in itertools.combinations_with_replacement(range(len(weights) + 1), parts - 1)
    )
    allowed = [b for b in every if not least or all(x < y for x, y in itertools.pairwise(b))]
    assert largest == min(max(sum(weights[a:b]) for a, b in itertools.pairwise(some)) for some in allowed)


def test_uniform_and_even_parts():
    assert uniform(10, 4) == [0, 3, 6, 8, 10]
    assert balanced([1] * 8, 4) == [0, 2, 4, 6, 8]
    assert balanced([1, 1, 1, 1, 4], 3) == [0, 2, 4, 5]


def test_a_limit_of_size_moves_layers_and_is_refused_with_numbers():
    assert balanced([4, 1, 1, 1], 2) == [0, 1, 4]
    assert balanced([4, 1, 1, 1], 2, sizes=[1, 5, 5, 5], limit=10) == [0, 2, 4]
    with pytest.raises(ValueError, match="cannot be divided into 2 consecutive parts of at most 7"):
        balanced([4, 1, 1, 1], 2, sizes=[1, 5, 5, 5], limit=7)
