"""From the positions of all ranks to the reason why they wait: pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from ds_comm.stalls.calls import Call, Position

ADVICE = (
    "All ranks of a group must call the same collectives in the same order, with tensors of the same shapes"
)


def explain(positions: Mapping[int, Position], silent: Sequence[int] = ()) -> str:
    """Describes a stall.

    Args:
        positions: of the ranks that have answered.
        silent: ranks that have not: they have ended, or their process does not run.
    """
    groups = dict.fromkeys(p.waits_in for p in positions.values() if p.waits_in is not None)
    lines = [f"rank {rank} does not answer: it has ended, or does not run" for rank in silent]
    for group in groups:
        members = [int(rank) for rank in group.split(",")]
        lines += _of_group(group, {rank: positions[rank] for rank in members if rank in positions})
    if not lines:
        return "no rank waits in a collective"
    return "\n".join([*lines, ADVICE])


def _of_group(group: str, positions: Mapping[int, Position]) -> list[str]:
    """Looks for the first collective of a group that not all of its ranks have called in the same way."""
    waiting = {rank: p for rank, p in positions.items() if p.waits_in == group}
    calls = {rank: {call.number: call for call in p.calls.get(group, ())} for rank, p in positions.items()}
    reached = [max(of_rank, default=-1) for of_rank in calls.values()]
    oldest = max((min(of_rank) for of_rank in calls.values() if of_rank), default=0)
    waited = max((p.waited_s for p in waiting.values()), default=0.0)
    for number in range(oldest, max(reached) + 1):
        there = {rank: of_rank[number] for rank, of_rank in calls.items() if number in of_rank}
        different = _by_text(there)
        if len(different) > 1:
            said = [f"{_ranks(ranks)}: {call}" for ranks, call in different]
            what = "shapes or dtypes" if len({call.name for call in there.values()}) == 1 else "collectives"
            return [
                f"ranks {group} wait since {waited:.0f} s, in different {what} (number {number} of their group):",
                *said,
            ]
        absent = [rank for rank in positions if rank not in there]
        if absent and there:
            call = next(iter(there.values()))
            lines = [f"{_ranks(sorted(there))} wait{'s' * (len(there) == 1)} since {waited:.0f} s in {call}"]
            for rank in absent:
                before = calls[rank].get(number - 1)
                since = (
                    f"; its last collective of this group was {before.name} at {before.site}"
                    if before
                    else ""
                )
                lines.append(f"rank {rank} has not called it: it is at {positions[rank].place}{since}")
            return lines
    call = next(iter(waiting.values())).calls[group][-1]
    return [
        f"ranks {group} wait since {waited:.0f} s, all in {call}: a message was lost, or the network is slow"
    ]


def _by_text(calls: Mapping[int, Call]) -> list[tuple[list[int], Call]]:
    """Ranks that made the same call, and that call. Sites may differ: branches may call the same collective."""
    kinds: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(list)
    for rank, call in sorted(calls.items()):
        kinds[call.name, call.tensors].append(rank)
    return [(ranks, calls[ranks[0]]) for ranks in kinds.values()]


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
