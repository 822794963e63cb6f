"""Interleaved 1F1B: several stages on each rank (Narayanan et al. 2021, section 2.2)."""

from __future__ import annotations

from ds_pipe.actions import Action, backward, forward
from ds_pipe.schedule.placement import looped
from ds_pipe.schedule.schedule import Schedule


def interleaved(num_ranks: int, num_microbatches: int, chunks: int = 2) -> Schedule:
    """Interleaved 1F1B with `chunks` stages on each rank.

    Micro-batches go through in groups: every chunk computes the whole group before the next chunk does. The bubble is
    1/chunks of that of 1F1B; `chunks` times as many messages are sent. A group has `num_ranks` micro-batches; if
    `num_ranks` does not divide their number, groups are larger. Smaller ones would have ranks wait for each other.
    """
    groups = _groups(num_ranks, num_microbatches)
    forwards = _order(groups, range(chunks))
    backwards = _order(groups, range(chunks)[::-1])
    position = {pair: i for i, pair in enumerate(forwards)}
    rows = []
    for r in range(num_ranks):
        ahead = (chunks - 1) * len(groups[0]) + 2 * (num_ranks - r - 1)
        row: list[Action] = []
        done = 0
        for i, (c, m) in enumerate(backwards):
            # One forward for each backward; more where the last group is smaller than the others.
            wanted = min(max(ahead + i, position[c, m]) + 1, len(forwards))
            row += [forward(c * num_ranks + r, m) for c, m in forwards[done:wanted]]
            done = max(done, wanted)
            row.append(backward(c * num_ranks + r, m))
        rows.append(tuple(row))
    return Schedule(
        name="interleaved",
        num_microbatches=num_microbatches,
        rank_of_stage=looped(num_ranks, chunks),
        actions=tuple(rows),
    )


def _groups(num_ranks: int, num_microbatches: int) -> list[range]:
    """Groups of at least `num_ranks` micro-batches, as equal as possible, larger ones first."""
    count = max(1, num_microbatches // num_ranks)
    size, more = divmod(num_microbatches, count)
    ends = [(i + 1) * size + min(i + 1, more) for i in range(count)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _order(groups: list[range], chunks: range) -> list[tuple[int, int]]:
    """(chunk, micro-batch) in the order in which a rank computes them."""
    return [(c, m) for group in groups for c in chunks for m in group]
