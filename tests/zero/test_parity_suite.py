"""The parity suite: every stage, precision, plan, optimizer and kind of model trains as one process does.

On every change a set of rows that contains every pair of settings, in `--full` all of them. docs/benchmarks/parity.md
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from harness import ranks
from harness.covering import covering, uncovered
from zero.suite import FACTORS, Case, judge, reference, same, sync_case, train

ROWS = covering(FACTORS)


def compare(case: Case) -> None:
    """Against one process, and against stage 0 with nothing overlapped or recomputed."""
    assert sync_case(case)
    found = train(case)
    judge(case, found, reference(case))
    bare = dataclasses.replace(case, stage=0, overlap=False, checkpointed=False)
    if bare != case:
        same(found, train(bare), f"{case} against stage 0")


@ranks(1, 2, 3, 4, timeout_s=300)
def test_a_set_with_every_pair(world_size: int) -> None:
    for row in ROWS:
        if row["ranks"] == world_size:
            compare(Case(**row))


def test_the_set_has_every_pair() -> None:
    assert not uncovered(ROWS, FACTORS, lambda row: True)
    assert len(ROWS) < 40


@pytest.mark.full
@ranks(1, 2, 3, 4, timeout_s=900)
@pytest.mark.parametrize("plan", FACTORS["plan"])
@pytest.mark.parametrize("optimizer", FACTORS["optimizer"])
@pytest.mark.parametrize("dtype", FACTORS["dtype"])
@pytest.mark.parametrize("model", FACTORS["model"])
def test_everything(world_size: int, model: str, dtype: str, optimizer: str, plan: str) -> None:
    fixed: dict[str, Any] = {"ranks": world_size, "model": model, "dtype": dtype, "optimizer": optimizer}
    for accumulation, clip in itertools.product(FACTORS["accumulation"], FACTORS["clip"]):
        own = {**fixed, "plan": plan, "accumulation": accumulation, "clip": clip}
        bare = Case(stage=0, overlap=False, checkpointed=False, **own)
        first = train(bare)
        judge(bare, first, reference(bare))
        for stage, overlap, again in itertools.product(
            *(FACTORS[k] for k in ("stage", "overlap", "checkpointed"))
        ):
            case = Case(stage=stage, overlap=overlap, checkpointed=again, **own)
            if case != bare:
                same(train(case), first, f"{case} against stage 0")
