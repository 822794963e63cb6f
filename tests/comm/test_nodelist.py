"""Slurm's compact lists against hand-expanded ones, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_comm.nodelist import expand_counts, expand_nodes


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node7", ["node7"]),
        ("a,b-1.cluster", ["a", "b-1.cluster"]),
        ("gpu[1-3]", ["gpu1", "gpu2", "gpu3"]),
        ("gpu[08-10,12]", ["gpu08", "gpu09", "gpu10", "gpu12"]),
        ("gpu[9-10]x", ["gpu9x", "gpu10x"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("login,gpu[1,3],cpu[01-02]", ["login", "gpu1", "gpu3", "cpu01", "cpu02"]),
    ],
)
def test_nodes(text: str, hosts: list[str]) -> None:
    assert expand_nodes(text) == hosts


@pytest.mark.parametrize("text", ["", "a,,b", "a[1-2", "a1-2]", "a[2-1]", "a[x-y]", "a[]", "a[[1]]"])
def test_malformed_nodes(text: str) -> None:
    with pytest.raises(ValueError):
        expand_nodes(text)


@given(st.lists(st.integers(0, 999), min_size=1, unique=True), st.sampled_from(["n", "gpu-", "a1b"]))
def test_any_numbers_in_one_bracket(numbers: list[int], prefix: str) -> None:
    text = f"{prefix}[{','.join(f'{n:03d}' for n in numbers)}]"
    assert expand_nodes(text) == [f"{prefix}{n:03d}" for n in numbers]


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 9)), min_size=1))
def test_counts(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{count}(x{times})" if times > 1 else f"{count}" for count, times in runs)
    assert expand_counts(text) == [count for count, times in runs for _ in range(times)]


@pytest.mark.parametrize("text", ["", "4,", "x2", "4(x)", "4(2)"])
def test_malformed_counts(text: str) -> None:
    with pytest.raises(ValueError, match="is not a count"):
        expand_counts(text)
