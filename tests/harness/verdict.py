"""From what each rank reported to one outcome of the test: pure functions and one that raises."""

from __future__ import annotations

import signal
from dataclasses import dataclass

import pytest

from harness.jobs import Kind, Report


@dataclass(frozen=True)
class Lost:
    """A rank that never reported: it died (`status`: its exit code) or was still busy (`status` None).

    timed_out: it used up the test's whole limit, rather than the grace after another rank's failure.
    """

    pid: int
    status: int | None
    when_s: float
    stacks: str = ""
    timed_out: bool = False


@dataclass(frozen=True)
class RunResult:
    """Everything known about one test: per rank a report or the lack of one, and what the ranks printed."""

    ranks: tuple[Report | Lost, ...]
    timeout_s: float
    output: str = ""


def announce(result: RunResult) -> None:
    """Returns if every rank passed; else skips, xfails or fails the running test."""
    kinds = {r.kind if isinstance(r, Report) else Kind.FAILED for r in result.ranks}
    first = result.ranks[0]
    if kinds == {Kind.PASSED}:
        return
    if kinds == {Kind.SKIPPED} and isinstance(first, Report):
        pytest.skip(first.headline)
    if kinds == {Kind.XFAILED} and isinstance(first, Report):
        pytest.xfail(first.headline)
    pytest.fail(describe(result), pytrace=False)


def describe(result: RunResult) -> str:
    """The text of a failure: the rank that failed first in full, one line for each of the others, all
    stacks of ranks that hung."""
    size = len(result.ranks)
    failed = [
        (r.when_s, i) for i, r in enumerate(result.ranks) if isinstance(r, Report) and r.kind is Kind.FAILED
    ]
    dead = [(r.when_s, i) for i, r in enumerate(result.ranks) if isinstance(r, Lost) and r.status is not None]
    hung = [i for i, r in enumerate(result.ranks) if isinstance(r, Lost) and r.status is None]
    order = [i for _, i in sorted(dead)] + [
        i for _, i in sorted(failed)
    ]  # a death makes the others fail, often sooner
    lines: list[str] = []
    if order:
        lines.append(f"{_headline(result, order[0])}")
        lines.extend(f"{_headline(result, i)}" for i in order[1:])
        first = result.ranks[order[0]]
        if isinstance(first, Report) and first.text:
            lines += ["", f"--- traceback of rank {order[0]} of {size} ---", first.text.rstrip()]
    elif hung:
        names = ", ".join(str(i) for i in hung)
        lines.append(f"no result after {result.timeout_s:g} s: rank {names} of {size} did not finish")
    else:
        lines.append("the ranks do not agree on the outcome of the test")
    lines += [_headline(result, i) for i in range(size) if i not in order]
    for i in hung:
        lost = result.ranks[i]
        if isinstance(lost, Lost) and (lost.timed_out or not order):
            lines += [
                "",
                f"--- stacks of rank {i} of {size} (pid {lost.pid}) ---",
                lost.stacks.rstrip() or "(none)",
            ]
    return "\n".join(lines)


def _headline(result: RunResult, rank: int) -> str:
    outcome = result.ranks[rank]
    who = f"rank {rank} of {len(result.ranks)}"
    if isinstance(outcome, Report):
        return f"{who} {outcome.kind.value}" + (f": {outcome.headline}" if outcome.headline else "")
    if outcome.status is not None:
        return f"{who} died: {describe_status(outcome.status)} (pid {outcome.pid})"
    if outcome.timed_out:
        return f"{who} did not finish within {result.timeout_s:g} s (pid {outcome.pid})"
    return f"{who} was still running and was ended"


def describe_status(status: int) -> str:
    """Words for a status of waitpid: 'killed by SIGKILL', 'exited with code 3'."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exited with code {status} before the end of the test"
