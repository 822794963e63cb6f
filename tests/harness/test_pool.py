"""What pytest is told about ranks that fail, hang, die or leave something behind."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import cases
from harness.jobs import Body, Kind, Report
from harness.pool import Limits, Pool
from harness.verdict import RunResult, describe


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """A pool of this file's own, with short limits, whose processes can be counted."""
    pool = Pool(Limits(after_failure_s=0.7, after_skip_s=0.7, barrier_s=0.7))
    yield pool
    pool.close()


def _run(
    pool: Pool, case: Callable[..., None], world_size: int = 2, timeout_s: float = 30.0, **arguments: Any
) -> RunResult:
    body = Body(cases.__name__, str(cases.__file__), case.__name__)
    return pool.run(body, world_size, arguments, timeout_s=timeout_s, groups_may_stay=False)


def _kinds(result: RunResult) -> list[Kind | None]:
    return [outcome.kind if isinstance(outcome, Report) else None for outcome in result.ranks]


def test_traceback_of_the_failing_rank(pool: Pool) -> None:
    result = _run(pool, cases.fails_on, rank=1)
    text = describe(result)
    assert _kinds(result) == [Kind.PASSED, Kind.FAILED]
    assert text.startswith("rank 1 of 2 failed: AssertionError")
    assert "--- traceback of rank 1 of 2 ---" in text
    assert "assert values == [1, 2, 99]" in text and "At index 2 diff: 1 != 99" in text
    assert "rank 0 of 2 passed" in text
    assert "worker.py" not in text


def test_the_first_failure_comes_first(pool: Pool) -> None:
    text = describe(_run(pool, cases.rank_1_fails_then_rank_0))
    first, second = text.splitlines()[:2]
    assert first == "rank 1 of 2 failed: KeyError: 'the cause'"
    assert second == "rank 0 of 2 failed: ValueError: the consequence"
    assert text.count("--- traceback") == 1


def test_a_rank_that_waits_for_a_failed_one_is_ended(pool: Pool) -> None:
    text = describe(_run(pool, cases.all_fail_rank_1_first))
    assert text.startswith("rank 1 of 2 failed: KeyError: 'the cause'")
    assert "rank 0 of 2 was still running and was ended" in text


def test_stacks_of_a_hang(pool: Pool) -> None:
    result = _run(pool, cases.hangs_on_rank_0, timeout_s=1.0)
    text = describe(result)
    assert text.startswith("no result after 1 s: rank 0 of 2 did not finish")
    assert "in hangs_on_rank_0" in text and "in _wait_in_a_thread" in text
    assert "rank 1 of 2 passed" in text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_rank(pool: Pool, number: signal.Signals) -> None:
    result = _run(pool, cases.is_killed_on_rank_1, signal_number=int(number))
    assert describe(result).startswith(f"rank 1 of 2 died: killed by {number.name} (pid ")
    assert "[rank 1] before the signal\n" in result.output
    assert ("in is_killed_on_rank_1" in result.output) == (number == signal.SIGSEGV)  # faulthandler


def test_a_rank_that_exits(pool: Pool) -> None:
    assert describe(_run(pool, cases.leaves_by_exit, code=3)).startswith(
        "rank 0 of 2 died: exited with code 3 before the end of the test"
    )
    assert describe(_run(pool, cases.exits, code=0)).splitlines()[0].endswith("failed: SystemExit: 0")


@pytest.mark.parametrize(
    ("case", "left"), [(cases.leaves_a_thread, "thread 'forgotten'"), (cases.leaves_a_group, "process group")]
)
def test_what_is_left_behind(pool: Pool, case: Callable[..., None], left: str) -> None:
    result = _run(pool, case)
    assert _kinds(result) == [Kind.FAILED, Kind.FAILED]
    assert "LeftBehindError" in describe(result) and left in describe(result)


def test_children_of_a_failed_rank_are_killed(pool: Pool, tmp_path: Path) -> None:
    _run(pool, cases.leaves_a_child_and_fails, pid_file=tmp_path / "pid")
    assert _ends(int((tmp_path / "pid").read_text()))


def test_a_body_may_take_the_group_down(pool: Pool) -> None:
    _run(pool, cases.says, text="warm")
    before = pool.num_forked
    for _ in range(2):  # only after them are the processes replaced
        assert _kinds(_run(pool, cases.takes_the_group_down)) == [Kind.PASSED, Kind.PASSED]
    assert pool.num_forked == before + 2


def test_unequal_collectives(pool: Pool) -> None:
    text = describe(_run(pool, cases.issues_one_collective_more_on_rank_0))
    assert "did each issue the same collectives" in text


def test_skips(pool: Pool) -> None:
    assert _kinds(_run(pool, cases.skips_on, first=0)) == [Kind.SKIPPED, Kind.SKIPPED]
    assert _kinds(_run(pool, cases.xfails)) == [Kind.XFAILED, Kind.XFAILED]
    text = describe(_run(pool, cases.skips_on, first=1))
    assert text.startswith("the ranks do not agree")
    assert "rank 0 of 2 passed" in text and "rank 1 of 2 skipped: needs fewer than 2 ranks" in text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", [cases.warns, cases.raises_in_del, cases.raises_in_a_thread])
def test_warnings_are_errors_where_the_test_says_so(pool: Pool, case: Callable[..., None]) -> None:
    assert _kinds(_run(pool, case)) == [Kind.FAILED, Kind.FAILED]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_warnings_are_ignored_where_the_test_says_so(pool: Pool) -> None:
    assert _kinds(_run(pool, cases.warns)) == [Kind.PASSED, Kind.PASSED]


def test_state_is_restored(pool: Pool, tmp_path: Path) -> None:
    assert _kinds(_run(pool, cases.disturbs_everything, folder=tmp_path)) == [Kind.PASSED, Kind.PASSED]
    after = _run(pool, cases.finds_everything_in_order, cwd=str(Path.cwd()))
    assert _kinds(after) == [Kind.PASSED, Kind.PASSED], describe(after)


def test_processes_are_kept_and_replaced_only_after_a_failure(tmp_path: Path) -> None:
    pool = Pool(Limits(after_failure_s=0.7))
    try:
        for world_size in (2, 2, 1, 3, 2):
            _run(pool, cases.writes_its_pid, world_size, folder=tmp_path)
        assert pool.num_forked == 3 and len(list(tmp_path.iterdir())) == 3
        assert Kind.FAILED in _kinds(_run(pool, cases.fails_on, 2, rank=0))
        _run(pool, cases.writes_its_pid, 3, folder=tmp_path)
        assert pool.num_forked == 5 and len(list(tmp_path.iterdir())) == 5  # the third rank had no part in it
        pids = [int(path.name) for path in tmp_path.iterdir()]
    finally:
        pool.close()
    assert all(_ends(pid) for pid in pids)


def test_folders_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.Popen(["true"])
    gone.wait()
    for owner in (gone.pid, os.getpid()):
        (tmp_path / f"ds-ranks-{owner}-x").mkdir()
    pool = Pool()
    assert not (tmp_path / f"ds-ranks-{gone.pid}-x").exists()
    assert len(list(tmp_path.glob(f"ds-ranks-{os.getpid()}-*"))) == 2
    pool.close()
    assert [path.name for path in tmp_path.iterdir()] == [f"ds-ranks-{os.getpid()}-x"]


def test_output_is_given_per_rank_and_once(pool: Pool) -> None:
    output = _run(pool, cases.says, text="first").output
    assert output == "".join(f"[rank {i}] first\n[rank {i}] from native code\n" for i in (0, 1))
    assert "first" not in _run(pool, cases.says, text="second").output
    long = _run(pool, cases.says, 1, text="x" * 30_000 + "end").output
    assert (
        "bytes are not shown" in long
        and long.rstrip().splitlines()[-2].endswith("end")
        and len(long) < 21_000
    )


def test_values_that_cannot_be_sent(pool: Pool) -> None:
    with pytest.raises(TypeError, match=r"text=<function .*cannot be sent to the rank processes"):
        _run(pool, cases.says, text=lambda: None)


def _ends(pid: int) -> bool:
    """Whether the process is gone within five seconds (a zombie counts: its parent is init, elsewhere)."""
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False
