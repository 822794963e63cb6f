"""The covering set covers, is small, and is the same every time."""

from __future__ import annotations

from harness.covering import Row, covering, uncovered

FACTORS = {"a": [0, 1, 2, 3], "b": ["x", "y", "z"], "c": [False, True], "d": [0, 1, 2, 3], "e": [None, 0.5]}


def everything(row: Row) -> bool:
    return True


def no_x_with_3(row: Row) -> bool:
    return not (row.get("a") == 3 and row.get("b") == "x")


def test_every_pair_is_there_and_rows_are_few() -> None:
    rows = covering(FACTORS)
    assert not uncovered(rows, FACTORS, everything)
    assert 16 <= len(rows) <= 22  # 16 pairs of a and d; all combinations are 192
    assert rows == covering(FACTORS)
    assert uncovered(rows[:-3], FACTORS, everything), "the check sees what is missing"


def test_what_is_not_allowed_is_left_out_and_nothing_else() -> None:
    rows = covering(FACTORS, no_x_with_3)
    assert all(no_x_with_3(row) for row in rows)
    assert not uncovered(rows, FACTORS, no_x_with_3)
