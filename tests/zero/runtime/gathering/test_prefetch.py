"""What is gathered ahead and kept: the plan, and that a given option is obeyed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ds_zero
from ds_zero import _registry
from ds_zero.runtime.bucket import Bucket, BucketState
from ds_zero.runtime.gathering.prefetch import Advice, Limits, Recorder, plan

UNITS = 6
SIZE = 10
NUMEL_OF = dict.fromkeys("abcdef", SIZE)


def fetched(order: str, **limits: int) -> list[str]:
    return ["".join(a.fetch) for a in plan(order, NUMEL_OF, Limits(**limits))]


def kept(order: str, **limits: int) -> str:
    return "".join(u for u, a in zip(order, plan(order, NUMEL_OF, Limits(**limits)), strict=True) if a.keep)


def test_by_default_the_next_unit_is_fetched() -> None:
    assert fetched("abcd") == ["b", "c", "d", ""]
    assert fetched("abcd", num_units=2) == ["bc", "d", "", ""]


def test_fetching_ahead_goes_on_while_less_is_on_its_way() -> None:
    assert fetched("abcdef", prefetch_numel=0) == [""] * 6
    assert fetched("abcdef", prefetch_numel=1) == ["b", "c", "d", "e", "f", ""]
    assert fetched("abcdef", prefetch_numel=SIZE + 1) == ["bc", "d", "e", "f", "", ""]
    assert fetched("abcdef", prefetch_numel=10**9) == ["bcdef", "", "", "", "", ""]


def test_nothing_is_fetched_or_kept_beyond_the_limit() -> None:
    assert fetched("abcdef", prefetch_numel=10**9, max_live_numel=3 * SIZE) == ["bc", "d", "e", "f", "", ""]
    assert fetched("abcd", max_live_numel=SIZE) == [""] * 4
    assert kept("abcba", max_reuse_distance_numel=10**9, max_live_numel=2 * SIZE) == "b"


def test_what_is_used_again_soon_stays() -> None:
    assert kept("abccba") == "c"
    assert kept("abccba", max_reuse_distance_numel=2 * SIZE - 1) == "bc"
    assert kept("abccba", max_reuse_distance_numel=2 * SIZE) == "abc"
    assert kept("aab") == "a"


def test_a_changed_order_is_planned_anew_and_told_once_a_pass() -> None:
    recorder = Recorder(NUMEL_OF, Limits())

    def run(order: str) -> tuple[list[str], tuple[str, str] | None]:
        recorder.begin(("", True))
        advice = ["".join(recorder.enter(unit).fetch) for unit in order]
        return advice, recorder.end()

    assert run("abcd") == ([""] * 4, None)
    assert run("abcd") == (["b", "c", "d", ""], None)
    assert run("acd") == (["b", "d", ""], ("c", "b"))  # it goes on behind the unit that is left out
    assert run("acd") == (["c", "d", ""], None)
    assert run("ad") == (["c", ""], ("d", "c"))
    assert run("adf") == (["d", "", ""], ("f", ""))
    assert run("a") == (["d"], ("", "d"))
    recorder.begin(("", True))
    recorder.enter("f")
    recorder.forget()
    assert run("a") == ([""], None)


def test_the_first_pass_of_a_kind_borrows_from_another_and_says_nothing() -> None:
    recorder = Recorder(NUMEL_OF, Limits())
    recorder.begin(("", True))
    recorder.enter("a")
    recorder.enter("b")
    assert recorder.end() is None
    recorder.begin(("", False))
    assert recorder.enter("a") == Advice(("b",), False)
    assert recorder.end() is None


class Chain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*(nn.Linear(32, 32, bias=False) for _ in range(UNITS)))


NUMEL = 32 * 32


def live_units(**options: int | bool) -> tuple[int, int, int]:
    """Most units gathered at once in a step after the plan is made, gathers of that step, and those that were
    started before their module's pre-hook."""
    torch.manual_seed(0)
    model = Chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = ds_zero.ZeroConfig(persistence_threshold_numel=0, **options)  # type: ignore[arg-type]
    ds_zero.shard(model, optimizer, 3, config=config)
    gatherer = _registry.state_of(model).gatherer
    counts = {"live": 0, "peak": 0, "gathers": 0, "early": 0}
    entered: list[str] = []
    start, drop, acquire = gatherer.start, gatherer.drop, gatherer.acquire

    def spy_start(bucket: Bucket) -> None:
        if bucket.state is BucketState.SHARDED:
            counts["live"] += 1
            counts["gathers"] += 1
            counts["early"] += bucket.layout.unit not in entered
            counts["peak"] = max(counts["peak"], counts["live"])
        start(bucket)

    def spy_drop(bucket: Bucket) -> None:
        counts["live"] -= bucket.state is BucketState.GATHERED
        drop(bucket)

    def spy_acquire(buckets: list[Bucket], *, late: bool = False) -> None:
        entered[:] = [str(b.layout.unit) for b in buckets]
        acquire(buckets, late=late)

    gatherer.start, gatherer.drop, gatherer.acquire = spy_start, spy_drop, spy_acquire  # type: ignore[method-assign]
    for _ in range(3):
        counts.update(peak=0, gathers=0, early=0)
        x: Tensor = model(torch.ones(2, 32))
        x.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counts["live"] == 0
    del gatherer.start, gatherer.drop, gatherer.acquire
    return counts["peak"], counts["gathers"], counts["early"]


@pytest.mark.parametrize(
    "options, peak, gathers, early",
    [
        # The last unit stays between forward and backward: 11 gathers for 2 * 6 uses.
        ({}, 2, 11, 10),
        ({"prefetch": False}, 1, 11, 0),
        ({"prefetch_numel": 0}, 1, 11, 0),
        ({"prefetch_numel": NUMEL + 1}, 4, 10, 9),
        ({"max_live_numel": NUMEL}, 1, 11, 0),
        ({"max_reuse_distance_numel": 4 * NUMEL, "prefetch": False}, 5, 7, 0),
        ({"max_reuse_distance_numel": 10**9}, UNITS, UNITS, UNITS - 1),
        ({"max_reuse_distance_numel": 10**9, "max_live_numel": 3 * NUMEL, "prefetch": False}, 3, 9, 0),
        ({"prefetch_numel": 10**9, "max_live_numel": 10**9}, UNITS, UNITS, UNITS - 1),
        ({"module_granularity_numel": 10 * NUMEL}, 1, 1, 0),
    ],
)
def test_options_are_obeyed(options: dict[str, int | bool], peak: int, gathers: int, early: int) -> None:
    assert live_units(**options) == (peak, gathers, early)
