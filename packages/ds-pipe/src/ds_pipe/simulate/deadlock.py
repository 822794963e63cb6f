"""The message of a deadlock: which rank waits for which, in a cycle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ds_pipe.actions import Action, Op
from ds_pipe.errors import DeadlockError
from ds_pipe.schedule.schedule import Schedule

_Program = Sequence[tuple[int, Action]]


def deadlock(
    schedule: Schedule,
    programs: Sequence[_Program],
    stuck: Mapping[int, tuple[int, Sequence[tuple[int, Action]]]],
) -> DeadlockError:
    """Returns the error for ranks that cannot go on.

    Args:
        schedule: the schedule.
        programs: for every rank its (step, action) in order.
        stuck: for every rank that waits the position in its program, and what it waits for.
    """
    waits: dict[int, tuple[int, str]] = {}
    for rank, (position, missing) in stuck.items():
        step, needed = missing[0]
        other, action = _source(schedule, programs, rank, step, needed, programs[rank][position][1])
        at = f"rank {rank} waits at {programs[rank][position][1]} for {action}"
        if (step, action) not in programs[other]:
            return DeadlockError(f"schedule {schedule.name}: {at}, which rank {other} never runs")
        behind = programs[other][stuck[other][0]][1]
        waits[rank] = (other, f"{at}, which rank {other} runs after {behind}")
    path = [next(iter(waits))]
    while path[-1] not in path[:-1]:
        path.append(waits[path[-1]][0])
    cycle = path[path.index(path[-1]) : -1]
    lines = "\n".join(f"  {waits[rank][1]}" for rank in cycle)
    return DeadlockError(f"schedule {schedule.name}: these ranks wait for each other:\n{lines}")


def _source(
    schedule: Schedule, programs: Sequence[_Program], rank: int, step: int, needed: Action, waiting: Action
) -> tuple[int, Action]:
    """The rank and action on which a need depends."""
    if not needed.op.receives:
        if needed.op is Op.BACKWARD_INPUT:
            whole = Action(needed.stage, Op.BACKWARD, needed.microbatch)
            needed = whole if (step, whole) in programs[rank] else needed
        return rank, needed
    position = programs[rank].index((step, waiting))
    if schedule.communicates and (step, needed) not in programs[rank][:position]:
        return rank, needed
    forward = needed.op is Op.RECV_FORWARD
    source = needed.stage + (-1 if forward else 1)
    other = schedule.rank_of_stage[source]
    if schedule.communicates:
        return other, Action(source, Op.SEND_FORWARD if forward else Op.SEND_BACKWARD, needed.microbatch)
    ops = (Op.FORWARD,) if forward else (Op.BACKWARD, Op.BACKWARD_INPUT)
    for op in ops:
        if (step, Action(source, op, needed.microbatch)) in programs[other]:
            return other, Action(source, op, needed.microbatch)
    return other, Action(source, ops[0], needed.microbatch)
