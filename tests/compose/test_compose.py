"""The table of what goes with what: its page, and the jobs behind it."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import torch.distributed as dist

from compose.jobs import AXES, Job, outcome, pairs
from compose.page import OUTCOMES, PAGE, key, page_of, recorded
from harness import ranks
from harness.covering import Row, covering

FULL = os.environ.get("DS_TEST_FULL") == "1"
RECORD = os.environ.get("DS_COMPOSE_RECORD") == "1"


def goes(row: Row) -> bool:
    """Whether all pairs of a row train, and two divisions fit four ranks; tracing alone takes many seconds."""
    features = [value for value in row.values() if value is not None]
    if "torch.compile" in features:
        return False
    if sum(axis in row and row[axis] is not None for axis in ("pipe", "tensor", "sequence", "expert")) > 1:
        return False
    outcomes = recorded()
    return all(
        outcomes.get(key(a, b), outcomes.get(key(b, a), "")) == ""
        for a, b in itertools.combinations(features, 2)
    )


def thin() -> list[Job]:
    """The largest jobs of those in which every pair meets that trains, two divisions and tracing apart."""
    factors = {axis: [*features] if axis == "stage" else [None, *features] for axis, features in AXES.items()}
    jobs = [
        frozenset(value for value in row.values() if value is not None) for row in covering(factors, goes)
    ]
    return sorted(jobs, key=len, reverse=True)[:8]


def test_the_page_is_what_the_generator_writes() -> None:
    outcomes = recorded()
    assert list(outcomes) == [key(a, b) for a, b in pairs()]
    assert PAGE.read_text() == page_of(outcomes), "run `cd tests && python -m compose.page`"


@ranks(4, groups_may_stay=True, timeout_s=3600 if FULL else 600)
def test_outcomes_are_those_of_the_page(tmp_path: Path) -> None:
    jobs: list[tuple[Job, str | None]] = [(frozenset((a, b)), key(a, b)) for a, b in pairs()]
    known = recorded() if OUTCOMES.exists() else {}
    if not FULL:  # the refusals, which cost nothing, and few jobs of many features
        jobs = [(job, name) for job, name in jobs if known[name or ""]]
        jobs += [(job, None) for job in thin()]
    seen: dict[str, str] = {}
    for number, (job, name) in enumerate(jobs):
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        dist.barrier()
        result = outcome(job, folder)
        if name is None:
            assert result == "", f"{sorted(job)}: {result}"
            continue
        seen[name] = result
        assert RECORD or result == known[name], f"{name}: {result or 'it trains'}"
    if RECORD and FULL and dist.get_rank() == 0:
        OUTCOMES.write_text(json.dumps(seen, indent=1) + "\n")
