"""Bubbles by the formulas of the papers, for equal stages and a backward in two parts as long as a forward."""

from __future__ import annotations


def bubble_of_one_step(name: str, num_ranks: int, num_microbatches: int, chunks: int = 2) -> float:
    """Returns the share of one step, alone, in which ranks do not compute.

    With p ranks, m micro-batches and v stages on each rank:

        gpipe, 1f1b     (p - 1) / (m + p - 1)
        interleaved     (p - 1) / (v m + p - 1)
        zb-h1, zb-h2    (p - 1) / (3 m + p - 1)
        zb-v            (p - 1) / (6 m + p - 1)

    In a step alone, the last rank has to wait for p - 1 forwards, so no schedule has less than the last two have.

    Raises:
        ValueError: there is no formula for this schedule.
    """
    p, m = num_ranks, num_microbatches
    work = {"gpipe": m, "1f1b": m, "interleaved": chunks * m, "zb-h1": 3 * m, "zb-h2": 3 * m, "zb-v": 6 * m}
    if name not in work:
        raise ValueError(f"no formula for the bubble of schedule {name!r}")
    return (p - 1) / (work[name] + p - 1)
