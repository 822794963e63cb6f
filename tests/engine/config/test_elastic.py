"""The section `elasticity`: one batch for many numbers of ranks, compared with a search by brute force."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ds_engine
from ds_engine.config import ConfigError, load
from ds_engine.config.built import effectless
from ds_engine.config.elastic import (
    ElasticityConfigError,
    ElasticityIncompatibleWorldSize,
    Limits,
    choose,
)
from ds_engine.config.elastic.candidates import candidates, compatible, highly_composite
from ds_engine.config.report.explain import explain
from engine import jobs
from harness import ranks

SECTION: dict[str, Any] = {
    "enabled": True,
    "max_train_batch_size": 100,
    "micro_batch_sizes": [2, 4],
    "version": 0.1,
}


def elastic(**more: Any) -> dict[str, Any]:
    return {"elasticity": {**SECTION, **more}}


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    micro = draw(st.lists(st.integers(1, 24), min_size=1, max_size=4))
    smallest = draw(st.integers(1, 12))
    model_parallel = draw(st.integers(1, 3))
    version = draw(st.sampled_from([0.1, 0.2]))
    by_machines = version == 0.2
    return Limits(
        max_batch=draw(st.integers(max(micro), 600)),
        micro_batches=tuple(micro),
        min_ranks=smallest,
        max_ranks=draw(st.integers(smallest, 120)),
        prefer_larger=draw(st.booleans()),
        ranks_per_node=model_parallel * draw(st.integers(1, 4)) if by_machines else 1,
        model_parallel=model_parallel if by_machines else 1,
        version=version,
    )


def num_divisors(number: int) -> int:
    return sum(number % n == 0 for n in range(1, number + 1))


def suited(batch: int, limits: Limits) -> list[int]:
    """Numbers of data-parallel ranks, by trying all of them."""
    group = limits.ranks_per_node // limits.model_parallel
    possible = []
    for nodes in range(1, limits.max_ranks + 1):
        if limits.min_ranks <= nodes * limits.ranks_per_node <= limits.max_ranks:
            share, rest = divmod(batch, nodes * group)
            if rest == 0 and any(share % micro == 0 for micro in limits.micro_batches):
                possible.append(nodes * group)
    return possible


def choose_or_none(limits: Limits) -> tuple[int, ...]:
    """Numbers of ranks that the batch suits; none if there is no batch."""
    try:
        return choose(limits).ranks
    except ElasticityConfigError:
        return ()


def test_highly_composite_numbers() -> None:
    divisors = [num_divisors(n) for n in range(1, 2001)]
    records = [n for n in range(1, 2001) if divisors[n - 1] > max(divisors[: n - 1], default=0)]
    assert records[:8] == [1, 2, 4, 6, 12, 24, 36, 48]
    for first, second in pairwise(records):
        assert highly_composite(first) == highly_composite(second - 1) == first
    assert highly_composite(10**9) == 735_134_400  # OEIS A002182


@given(limits())
@settings(max_examples=300, deadline=None)
def test_the_batch_suits_the_most_numbers_of_ranks_of_all_candidates(limits: Limits) -> None:
    group = limits.ranks_per_node // limits.model_parallel
    options = {}
    for base in {*limits.micro_batches, math.lcm(*limits.micro_batches)}:
        factors = [n for n in range(1, limits.max_batch + 1) if base * n <= limits.max_batch // group]
        if factors:
            most = max(num_divisors(n) for n in factors)
            batch = base * group * next(n for n in factors if num_divisors(n) == most)
            options[batch] = suited(batch, limits)
    best = max(map(len, options.values()), default=0)
    if not best:
        with pytest.raises(ElasticityConfigError, match="max_train_batch_size"):
            choose(limits)
        return
    equal = [batch for batch, numbers in options.items() if len(numbers) == best]
    chosen = choose(limits)
    assert chosen.train == (max(equal) if limits.prefer_larger else min(equal))
    assert list(chosen.ranks) == options[chosen.train]


@given(limits(), st.integers(1, 150))
@settings(max_examples=300, deadline=None)
def test_every_accepted_number_of_ranks_divides_a_batch_within_the_limit(limits: Limits, num: int) -> None:
    smallest = min(limits.micro_batches) * num
    possible = choose_or_none(limits)
    if (limits.version == 0.1 and num not in possible) or (
        limits.version == 0.2 and smallest > limits.max_batch
    ):
        with pytest.raises(ElasticityIncompatibleWorldSize, match=str(num)):
            choose(limits, num)
        return
    chosen = choose(limits, num)
    batch = chosen.on(num)
    assert batch.train == batch.micro * batch.steps * batch.ranks <= limits.max_batch
    assert batch.ranks == num and batch.micro in limits.micro_batches
    larger = [micro for micro in limits.micro_batches if micro > batch.micro]
    assert not any((batch.train // num) % micro == 0 for micro in larger)
    if limits.version == 0.1:
        assert chosen == choose(limits)


def test_the_least_common_multiple_does_not_lift_the_limit() -> None:
    """lcm(8, 10, 12) is 120, above the limit."""
    assert candidates((8, 10, 12), 100) == [60, 72, 96]
    assert compatible(96, (8, 10, 12), 1, 100) == (1, 2, 3, 4, 6, 8, 12)


def test_another_number_of_ranks_gets_a_batch_of_its_own_in_version_02() -> None:
    limits = Limits(max_batch=100, micro_batches=(2, 8, 10, 12))
    assert choose(limits).train == choose(limits, 8).train == 96
    assert choose(limits, 7).on(7) == ds_engine.config.Batch(train=98, micro=2, steps=7, ranks=7)
    smaller = Limits(max_batch=100, micro_batches=(2, 8, 10, 12), prefer_larger=False)
    assert choose(smaller, 7).on(7).train == 56


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (elastic(version=0.3), "elasticity.version is 0.3: it must be 0.1 or 0.2"),
        (elastic(micro_batch_sizes=[4, 128]), "contains 128, more than max_train_batch_size 100"),
        (elastic(micro_batch_sizes=[]), "micro_batch_sizes is empty"),
        (elastic(model_parallel_size=2), "model_parallel_size 2 needs elasticity.version 0.2"),
        (
            elastic(version=0.2, num_gpus_per_node=6, model_parallel_size=4),
            "num_gpus_per_node 6 must be a multiple of model_parallel_size 4",
        ),
        ({"elasticity": {"enabled": True, "micro_batch_sizes": [2]}}, "max_train_batch_size is missing"),
        ({"elasticity": {"enabled": True, "max_train_batch_size": 9}}, "micro_batch_sizes is missing"),
        ({**elastic(), "train_batch_size": 96}, "train_batch_size contradict"),
        (
            {**elastic(), "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
            "train_micro_batch_size_per_gpu and gradient_accumulation_steps contradict",
        ),
    ],
)
def test_mistakes(section: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(section)


def test_the_config_takes_its_batch_sizes_from_the_section() -> None:
    config = load(elastic())
    assert config.batch(3) == ds_engine.config.Batch(train=96, micro=4, steps=8, ranks=3)
    assert config.batch(48) == ds_engine.config.Batch(train=96, micro=2, steps=1, ranks=48)
    with pytest.raises(ElasticityIncompatibleWorldSize, match="96 samples cannot be divided among 7 ranks"):
        config.batch(7)
    shown = {setting.path: setting for setting in explain(config, ranks=3)}
    assert shown["train_batch_size"].value == 96 and "by elasticity" in shown["train_batch_size"].origin


def test_sizes_beside_the_section_can_be_ignored() -> None:
    config = load({**elastic(ignore_non_elastic_batch_info=True), "train_batch_size": 7})
    assert config.batch(2).train == 96
    assert effectless(config) == {"train_batch_size": "the section elasticity chooses the batch sizes"}
    shown = {setting.path: setting for setting in explain(config, ranks=2)}
    assert shown["train_batch_size"].value == 96
    assert load({"elasticity": {**SECTION, "enabled": False}, "train_batch_size": 8}).batch(2).train == 8


@ranks(2)
def test_the_engine_trains_with_the_elastic_batch() -> None:
    sizes = {"train_batch_size": None, "train_micro_batch_size_per_gpu": None}
    engine = jobs.engine(0, **sizes, gradient_accumulation_steps=None, **elastic(max_train_batch_size=16))
    try:
        sizes_of_engine = engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()
        assert (*sizes_of_engine, engine.gradient_accumulation_steps()) == (16, 4, 2)
        assert torch.isfinite(torch.tensor(jobs.train(engine, 1))).all()
    finally:
        engine.destroy()
