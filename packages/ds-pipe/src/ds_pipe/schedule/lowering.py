"""Passes that add to a schedule of computations what an executor does besides: messages, gathering, reduction.

Each is a function from a schedule to a schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ds_pipe.actions import Action, Op, computations
from ds_pipe.errors import ScheduleError
from ds_pipe.schedule.schedule import Schedule

_Row = tuple[Action, ...]


def lower(
    schedule: Schedule, *, receive_ahead: int = 1, sharded: bool = False, max_unsharded: int = 2
) -> Schedule:
    """Returns a schedule of computations with all that an executor needs.

    Args:
        schedule: a schedule without messages.
        receive_ahead: how many computations before its use a message may arrive.
        sharded: whether parameters of stages are gathered before use and dropped after it.
        max_unsharded: how many stages of a rank may be gathered at the same time.
    """
    lowered = with_communication(merged_backwards(schedule), receive_ahead=receive_ahead)
    if sharded:
        lowered = with_unshard(lowered, max_unsharded=max_unsharded)
    return with_reduction(lowered) if schedule.trains else lowered


def merged_backwards(schedule: Schedule) -> Schedule:
    """Joins both parts of a backward where they follow each other and no other rank waits for the first, since a whole
    backward is cheaper.
    """
    return replace(schedule, actions=tuple(_merge(schedule, row) for row in schedule.actions))


def _merge(schedule: Schedule, row: _Row) -> _Row:
    merged: list[Action] = []
    for action in row:
        first = merged[-1] if merged else None
        if (
            first is not None
            and (first.op, action.op) == (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
            and (first.stage, first.microbatch) == (action.stage, action.microbatch)
            and not _sends(schedule, first)
        ):
            merged[-1] = Action(action.stage, Op.BACKWARD, action.microbatch)
        else:
            merged.append(action)
    return tuple(merged)


def with_communication(schedule: Schedule, *, receive_ahead: int = 1) -> Schedule:
    """Adds sends and receives between ranks.

    A send starts directly after the computation that makes the message. A receive starts `receive_ahead` computations
    before the one that needs it, so that the message arrives meanwhile. Between two ranks, receives start in the order
    of the sends, which is the order in which messages arrive. Overlaps are taken apart, so that the message of the
    first part leaves before the second.
    """
    if schedule.communicates:
        raise ScheduleError(f"schedule {schedule.name} has sends and receives already")
    sends = [[_sends(schedule, leaf) for leaf in computations(row)] for row in schedule.actions]
    order: dict[tuple[int, int], list[Action]] = {}
    for rank, messages in enumerate(sends):
        for send in (send for one in messages for send in one):
            receive = _receive(send)
            order.setdefault((rank, schedule.rank_of_stage[receive.stage]), []).append(receive)
    rows = []
    for rank, row in enumerate(schedule.actions):
        position = _uses(schedule, row)
        before: dict[int, list[Action]] = {}
        for (_, to), receives in order.items():
            if to != rank:
                continue
            at = len(row)
            for receive in reversed(receives):  # no receive starts after one whose message comes later
                at = min(at, max(0, position[receive] - receive_ahead))
                before.setdefault(at, []).insert(0, receive)
        lowered: list[Action] = []
        for i, action in enumerate(row):
            lowered += before.get(i, [])
            for leaf in action.leaves():
                lowered += [leaf, *_sends(schedule, leaf)]
        rows.append(tuple(lowered))
    return replace(schedule, actions=tuple(rows))


def _sends(schedule: Schedule, action: Action) -> list[Action]:
    """What has to be sent to another rank after a computation: nothing or one message."""
    stage, rank_of = action.stage, schedule.rank_of_stage
    if action.op is Op.FORWARD:
        crosses = stage + 1 < len(rank_of) and rank_of[stage + 1] != rank_of[stage]
        return [Action(stage, Op.SEND_FORWARD, action.microbatch)] if crosses else []
    if action.op in (Op.BACKWARD, Op.BACKWARD_INPUT):
        crosses = stage > 0 and rank_of[stage - 1] != rank_of[stage]
        return [Action(stage, Op.SEND_BACKWARD, action.microbatch)] if crosses else []
    return []


def _receive(send: Action) -> Action:
    if send.op is Op.SEND_FORWARD:
        return Action(send.stage + 1, Op.RECV_FORWARD, send.microbatch)
    return Action(send.stage - 1, Op.RECV_BACKWARD, send.microbatch)


def _uses(schedule: Schedule, row: _Row) -> dict[Action, int]:
    """For every possible receive of a rank the index of the action that needs its message."""
    found = {}
    for i, action in enumerate(row):
        for leaf in action.leaves():
            if leaf.op is Op.FORWARD:
                found[Action(leaf.stage, Op.RECV_FORWARD, leaf.microbatch)] = i
            elif leaf.op in (Op.BACKWARD, Op.BACKWARD_INPUT):
                found[Action(leaf.stage, Op.RECV_BACKWARD, leaf.microbatch)] = i
    return found


def with_unshard(schedule: Schedule, *, max_unsharded: int = 2) -> Schedule:
    """Adds the gathering of each stage's parameters ahead of its use, and their dropping.

    Args:
        schedule: a schedule.
        max_unsharded: the next so many different stages of a rank stay gathered.
    """
    if max_unsharded < 1:
        raise ScheduleError(f"max_unsharded={max_unsharded}: one stage at least has to be gathered")
    rows = []
    for row in schedule.actions:
        uses = [leaf.stage for leaf in computations(row)]
        gathered: list[int] = []
        lowered: list[Action] = []
        done = 0
        for action in row:
            wanted = _next_stages(uses[done:], max_unsharded) if action.op.computes else gathered
            lowered += [Action(s, Op.RESHARD) for s in gathered if s not in wanted]
            lowered += [Action(s, Op.UNSHARD) for s in wanted if s not in gathered]
            gathered = list(wanted)
            lowered.append(action)
            done += len(action.leaves()) if action.op.computes else 0
        lowered += [Action(s, Op.RESHARD) for s in gathered]
        rows.append(tuple(lowered))
    return replace(schedule, actions=tuple(rows))


def _next_stages(uses: Sequence[int], count: int) -> list[int]:
    return list(dict.fromkeys(uses))[:count]


def with_reduction(schedule: Schedule) -> Schedule:
    """Adds the reduction of each stage's gradients directly after the last computation that adds to them."""
    rows = []
    for row in schedule.actions:
        last = {
            leaf.stage: i
            for i, action in enumerate(row)
            if action.op.computes
            for leaf in action.leaves()
            if leaf.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT)
        }
        lowered: list[Action] = []
        for i, action in enumerate(row):
            lowered.append(action)
            if i + 1 == len(row) or not row[i + 1].op.sends:  # another rank waits for the message
                lowered += [Action(stage, Op.REDUCE_GRAD) for stage, at in last.items() if at <= i]
                last = {stage: at for stage, at in last.items() if at > i}
        rows.append(tuple(lowered))
    return replace(schedule, actions=tuple(rows))
