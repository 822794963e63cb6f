"""Which configurations are tried."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_engine.tune import Candidate, Space, candidates

FREE = Space(ranks=2, train_batch=None, stages=(0, 3), max_micro=8)


def sizes(space: Space) -> list[tuple[int, int]]:
    return list(space.sizes())


def test_batch_sizes_are_powers_of_two_or_divide_the_given_batch() -> None:
    assert sizes(FREE) == [(1, 1), (2, 1), (4, 1), (8, 1)]
    assert sizes(replace(FREE, train_batch=24)) == [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2)]
    assert sizes(replace(FREE, min_micro=2, max_train=8, steps=2)) == [(2, 2)]
    assert sizes(replace(FREE, min_train=9)) == [(8, 1)]


def test_every_combination_is_a_candidate() -> None:
    made = candidates(replace(FREE, offloads=("none", "cpu"), recompute=(False, True)))
    assert len(made) == len(set(made)) == 2 * 2 * 2 * 4


def test_impossible_limits_are_named() -> None:
    with pytest.raises(ValueError, match="train_batch_size 5 is not a multiple of 2 ranks"):
        candidates(replace(FREE, train_batch=5))
    with pytest.raises(ValueError, match="no micro-batch from 16 to 8"):
        candidates(replace(FREE, min_micro=16))


def test_a_candidate_replaces_what_it_decides_and_keeps_the_rest() -> None:
    base = {
        "train_batch_size": 64,
        "gradient_accumulation_steps": 8,
        "bf16": {"enabled": True},
        "autotuning": {"enabled": True},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": True,
            "offload_optimizer": {"device": "nvme", "ratio": 0.5},
        },
    }
    candidate = Candidate(stage=1, micro=4, steps=2, offload="cpu")
    assert candidate.config(base) == {
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 1,
            "overlap_comm": True,
            "offload_optimizer": {"device": "cpu", "ratio": 0.5},
        },
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
    }
    assert "offload_optimizer" not in replace(candidate, offload="none").config(base)["zero_optimization"]
    assert base["zero_optimization"]["stage"] == 2
    assert str(candidate) == "stage 1, micro-batch 4 x 2, offload to cpu"


def test_degrees_divide_the_ranks_and_change_batches_and_keys() -> None:
    space = replace(
        FREE, ranks=4, train_batch=8, tensors=(1, 2), sequences=(1, 2), experts=(1, 4), stages=(1,)
    )
    made = candidates(space)
    # Experts need as many data-parallel ranks: only without other degrees are there four.
    assert {(one.tensor, one.sequence, one.expert) for one in made} == {
        (1, 1, 1),
        (1, 1, 4),
        (2, 1, 1),
        (1, 2, 1),
        (2, 2, 1),
    }
    assert all(one.micro * one.steps * (4 // one.model_ranks) == 8 for one in made)
    both = next(one for one in made if one.model_ranks == 4)
    config = both.config({"tensor_parallel": {"autotp_size": 1, "dtype": "bf16"}})
    assert config["tensor_parallel"] == {"autotp_size": 2, "dtype": "bf16"}
    assert config["sequence_parallel_size"] == 2 and "tensor 2, sequence 2" in str(both)
    plain = next(one for one in made if one.model_ranks * one.expert == 1)
    assert "tensor_parallel" not in plain.config({}) and plain.arguments() == {}
    experts = next(one for one in made if one.expert == 4)
    assert experts.arguments() == {"ep_size": 4} and experts.group != plain.group
