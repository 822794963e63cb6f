"""The words for what ranks did, without any process."""

from __future__ import annotations

import pytest

from harness.jobs import Kind, Report
from harness.verdict import Lost, RunResult, announce, describe


def _result(*ranks: Report | Lost) -> RunResult:
    return RunResult(ranks, 60.0)


def test_all_passed() -> None:
    announce(_result(Report(Kind.PASSED), Report(Kind.PASSED)))


def test_skip_and_xfail() -> None:
    with pytest.raises(pytest.skip.Exception, match="no GPU"):
        announce(_result(Report(Kind.SKIPPED, "no GPU"), Report(Kind.SKIPPED, "no GPU")))
    with pytest.raises(pytest.xfail.Exception, match="known"):
        announce(_result(Report(Kind.XFAILED, "known")))


def test_one_skip_is_a_failure() -> None:
    with pytest.raises(pytest.fail.Exception, match="do not agree"):
        announce(_result(Report(Kind.PASSED), Report(Kind.SKIPPED, "no GPU")))


def test_order_is_by_time_and_a_death_is_the_cause() -> None:
    failed = [Report(Kind.FAILED, f"E{i}", f"traceback {i}", when_s=10.0 - i) for i in range(3)]
    lines = describe(_result(*failed)).splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [f"rank {i} of 3 failed" for i in (2, 1, 0)]
    assert lines[-1] == "traceback 2"
    dead = Lost(7, -9, when_s=99.0)
    assert describe(_result(failed[0], dead)).startswith(
        "rank 1 of 2 died: killed by SIGKILL (pid 7)\nrank 0 of 2 fail"
    )


def test_a_hang_shows_all_stacks() -> None:
    text = describe(
        _result(Lost(1, None, 0.0, "stack A", True), Report(Kind.PASSED), Lost(3, None, 0.0, "stack C", True))
    )
    assert text.startswith("no result after 60 s: rank 0, 2 of 3 did not finish")
    assert "stack A" in text and "stack C" in text
