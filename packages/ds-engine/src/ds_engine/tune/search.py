"""The search: predictions choose what is tried, and what was measured corrects the predictions.

[Note: search by corrected predictions]
A search that knows nothing, such as a Bayesian one, needs tens of trials to learn what memory and arithmetic already
say. Here every candidate has a predicted throughput and a predicted peak of memory. Those that do not fit are never
started. Of the others the one with the highest predicted throughput is tried. Measured throughput divided by the
predicted one is the correction of its group (same stage, offload and recomputation; of several trials, that with the
nearest micro-batch counts), and the mean of all corrections is that of groups without a trial. The search ends when no
other candidate can be faster within the precision of corrected predictions, or after the allowed number of trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ds_engine.tune.candidates import Candidate

_KNOWN, _UNKNOWN = 1.03, 1.3
"""A candidate is worth a trial while its corrected prediction times this factor exceeds the best measurement. The first
factor is for groups with a trial, the second for groups without one.
"""

_AS_LARGE = 0.9
"""Part of the predicted memory of a candidate that ran out of memory, from which on others are not tried."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is known of a candidate before it runs."""

    candidate: Candidate
    samples_per_s: float
    """Of all ranks."""
    memory_bytes: int
    """Peak of the device memory of a rank."""
    fits: bool
    reason: str = ""
    """Why there is no prediction; such a candidate does not fit."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a trial has shown."""

    candidate: Candidate
    samples_per_s: float | None
    """None: the trial failed."""
    reason: str = ""
    """Why it failed."""
    out_of_memory: bool = False
    ran: Mapping[str, object] = field(default_factory=dict)
    """The settings that were really in effect, as the engine has told them."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The end of a search."""

    best: Outcome | None
    """None: nothing fits, or every trial failed."""
    outcomes: tuple[Outcome, ...]
    reason: str
    """Why the search ended, or why there is no answer."""
    why: tuple[str, ...] = ()
    """Why this is the answer, one sentence each."""


@dataclass
class Search:
    """Chooses what is tried next."""

    predictions: Sequence[Prediction]
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self, trial: Callable[[Candidate], Outcome], *, trials: int) -> Tuned:
        """Tries at most `trials` candidates, those of earlier outcomes included.

        Args:
            trial: runs a candidate; failures are outcomes, too.
        """
        reason = f"{trials} trial{'s' * (trials != 1)} were allowed"
        while len(self.outcomes) < trials:
            chosen = self.next()
            if chosen is None:
                reason = self._why_none()
                break
            self.outcomes.append(trial(chosen))
        best = self.best()
        if best is None and self.outcomes:
            failed = "; ".join(f"{one.candidate}: {one.reason}" for one in self.outcomes)
            reason = f"every trial failed ({failed})"
        return Tuned(best=best, outcomes=tuple(self.outcomes), reason=reason)

    def best(self) -> Outcome | None:
        """The fastest outcome so far."""
        good = [one for one in self.outcomes if one.samples_per_s is not None]
        return max(good, key=lambda one: one.samples_per_s or 0.0, default=None)

    def next(self) -> Candidate | None:
        """The candidate to try now; None if none can be faster than the best so far."""
        best = self.best()
        chosen, highest = None, 0.0
        for prediction in self.predictions:
            if not prediction.fits or self._is_excluded(prediction):
                continue
            value = prediction.samples_per_s * self.correction(prediction.candidate)
            hope = value * (_KNOWN if self._tried(prediction.candidate.group) else _UNKNOWN)
            if best is not None and hope <= (best.samples_per_s or 0.0):
                continue
            if value > highest:
                chosen, highest = prediction.candidate, value
        return chosen

    def correction(self, candidate: Candidate) -> float:
        """Measured over predicted throughput, of the trials that say most about this candidate."""
        predicted = {one.candidate: one.samples_per_s for one in self.predictions}
        ratios = [
            (one.candidate, one.samples_per_s / predicted[one.candidate])
            for one in self.outcomes
            if one.samples_per_s is not None and predicted.get(one.candidate, 0.0) > 0
        ]
        near = [pair for pair in ratios if pair[0].group == candidate.group]
        if near:
            distance = lambda pair: abs(math.log2(pair[0].micro / candidate.micro))  # noqa: E731
            return min(near, key=distance)[1]
        return math.exp(sum(math.log(ratio) for _, ratio in ratios) / len(ratios)) if ratios else 1.0

    def _tried(self, group: tuple[object, ...]) -> bool:
        return any(one.candidate.group == group for one in self.outcomes)

    def _is_excluded(self, prediction: Prediction) -> bool:
        """Whether it was tried, or needs about as much memory as one that ran out of it, or more."""
        memory = {one.candidate: one.memory_bytes for one in self.predictions}
        return any(
            one.candidate == prediction.candidate
            or (
                one.out_of_memory
                and prediction.memory_bytes >= _AS_LARGE * memory.get(one.candidate, math.inf)
            )
            for one in self.outcomes
        )

    def _why_none(self) -> str:
        if self.outcomes:
            return "no other configuration can be faster, as far as predictions corrected by the trials say"
        unplanned = [one for one in self.predictions if one.reason]
        if len(unplanned) == len(self.predictions):
            return unplanned[0].reason if unplanned else "there is nothing to try"
        least = min((one for one in self.predictions if not one.reason), key=lambda one: one.memory_bytes)
        return f"nothing fits: {least.candidate} needs least, {least.memory_bytes / 2**20:,.1f} MiB a rank"
