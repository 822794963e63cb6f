"""Schedules with one stage on each rank and whole backwards: GPipe, 1F1B; and forwards only."""

from __future__ import annotations

from collections.abc import Sequence

from ds_pipe.actions import Action, backward, forward
from ds_pipe.schedule.placement import looped
from ds_pipe.schedule.schedule import Schedule


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019). Keeps the activations of all micro-batches."""
    rows = [
        [
            *(forward(r, m) for m in range(num_microbatches)),
            *(backward(r, m) for m in range(num_microbatches)),
        ]
        for r in range(num_ranks)
    ]
    return _schedule("gpipe", num_microbatches, looped(num_ranks), rows)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B (PipeDream-Flush; Narayanan et al. 2021): rank r has at most `num_ranks - r` micro-batches in flight."""
    rows = []
    for r in range(num_ranks):
        ahead = min(num_ranks - r - 1, num_microbatches)
        row = [forward(r, m) for m in range(ahead)]
        for m in range(num_microbatches):
            if ahead + m < num_microbatches:
                row.append(forward(r, ahead + m))
            row.append(backward(r, m))
        rows.append(row)
    return _schedule("1f1b", num_microbatches, looped(num_ranks), rows)


def inference(num_ranks: int, num_microbatches: int, chunks: int = 1) -> Schedule:
    """Forwards only. With several stages on a rank, micro-batches go through in groups of `num_ranks`."""
    rows = []
    for r in range(num_ranks):
        row = []
        for first in range(0, num_microbatches, num_ranks):
            group = range(first, min(first + num_ranks, num_microbatches))
            row += [forward(c * num_ranks + r, m) for c in range(chunks) for m in group]
        rows.append(row)
    return _schedule("inference", num_microbatches, looped(num_ranks, chunks), rows)


def _schedule(
    name: str, num_microbatches: int, rank_of_stage: tuple[int, ...], rows: Sequence[Sequence[Action]]
) -> Schedule:
    return Schedule(
        name=name,
        num_microbatches=num_microbatches,
        rank_of_stage=rank_of_stage,
        actions=tuple(map(tuple, rows)),
    )
