"""The search: few trials, memory as a limit, the same answer after an interruption, always an end."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from ds_engine.tune import Candidate, Outcome, Prediction, Search, Space, candidates

ALL = candidates(
    Space(ranks=4, train_batch=None, offloads=("none", "cpu"), recompute=(False, True), max_micro=64)
)


def saturating(candidate: Candidate, half: float) -> float:
    """Samples per second that grow with the micro-batch, slower for higher stages, offload and recomputation."""
    value = candidate.micro / (candidate.micro + half) * (1 - 0.04 * candidate.stage)
    return 1000 * value * (0.7 if candidate.offload == "cpu" else 1) * (0.75 if candidate.recompute else 1)


def memory(candidate: Candidate) -> int:
    states = 16 / (1 if candidate.stage == 0 else 4) if candidate.offload == "none" else 4
    return int(states + candidate.micro * (0.2 if candidate.recompute else 1.0))


def predictions(value: Callable[[Candidate], float], limit: int) -> list[Prediction]:
    return [
        Prediction(
            candidate=one, samples_per_s=value(one), memory_bytes=memory(one), fits=memory(one) <= limit
        )
        for one in ALL
    ]


@pytest.mark.parametrize("seed", range(10))
def test_0_97_of_the_best_in_five_trials_although_predictions_are_wrong(seed: int) -> None:
    draw = random.Random(seed)
    half, limit = draw.uniform(0.5, 8), draw.choice([12, 24, 70])
    # Each group is off by its own factor, and each candidate by up to 2 %.
    groups = {one.group: math.exp(draw.gauss(0, 0.05)) for one in ALL}
    overall = draw.uniform(0.5, 2)
    truth = {
        one: saturating(one, half) * overall * groups[one.group] * draw.uniform(0.98, 1.02) for one in ALL
    }
    known = predictions(lambda one: saturating(one, half * draw.uniform(0.8, 1.25)), limit)
    tried: list[Candidate] = []

    def trial(candidate: Candidate) -> Outcome:
        tried.append(candidate)
        assert memory(candidate) <= limit
        return Outcome(candidate=candidate, samples_per_s=truth[candidate])

    tuned = Search(known).run(trial, trials=5)
    assert tuned.best is not None and tuned.best.samples_per_s is not None
    assert len(tried) == len(set(tried)) <= 5
    assert tuned.best.samples_per_s >= 0.97 * max(truth[one.candidate] for one in known if one.fits)


def test_interrupted_and_continued_it_gives_the_same_answer() -> None:
    known = predictions(lambda one: saturating(one, 3), 30)

    def trial(candidate: Candidate) -> Outcome:
        return Outcome(
            candidate=candidate, samples_per_s=saturating(candidate, 5) * (1 + candidate.stage % 2 / 10)
        )

    whole = Search(known).run(trial, trials=5)
    for done in range(len(whole.outcomes)):
        again = Search(known, list(whole.outcomes[:done])).run(trial, trials=5)
        assert again == whole


def test_it_ends_early_when_nothing_can_be_faster() -> None:
    known = predictions(lambda one: saturating(one, 3), 70)
    tuned = Search(known).run(
        lambda one: Outcome(candidate=one, samples_per_s=saturating(one, 3)), trials=len(ALL)
    )
    assert len(tuned.outcomes) < 8 and "no other configuration can be faster" in tuned.reason


def test_what_ran_out_of_memory_excludes_all_that_need_as_much() -> None:
    known = predictions(lambda one: saturating(one, 3), 1000)
    tried: list[Candidate] = []

    def trial(candidate: Candidate) -> Outcome:
        tried.append(candidate)
        if candidate.micro > 8:
            return Outcome(
                candidate=candidate, samples_per_s=None, reason="out of memory", out_of_memory=True
            )
        return Outcome(candidate=candidate, samples_per_s=saturating(candidate, 3))

    tuned = Search(known).run(trial, trials=40)
    assert tuned.best is not None and tuned.best.candidate.micro in (4, 8)
    for number, one in enumerate(tried):
        assert not any(b.micro > 8 and memory(b) <= memory(one) for b in tried[:number])


def test_without_an_answer_there_is_a_reason() -> None:
    def never(candidate: Candidate) -> Outcome:
        raise AssertionError("nothing fits, so nothing may be tried")

    tuned = Search(predictions(lambda one: 1.0, 3)).run(never, trials=5)
    assert tuned.best is None and "nothing fits: stage" in tuned.reason and "needs least" in tuned.reason
    broken = Search(predictions(lambda one: 1.0, 1000)).run(
        lambda one: Outcome(candidate=one, samples_per_s=None, reason="RuntimeError: no"), trials=2
    )
    assert (
        broken.best is None and "every trial failed" in broken.reason and "RuntimeError: no" in broken.reason
    )
    refused = [
        Prediction(candidate=ALL[0], samples_per_s=0, memory_bytes=0, fits=False, reason="stage 3 and X")
    ]
    assert Search(refused).run(never, trials=5).reason == "stage 3 and X"
