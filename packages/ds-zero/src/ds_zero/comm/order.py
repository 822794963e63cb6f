"""Records the order in which each rank has run modules, and finds the cause when ranks stall. No communication.

[Note: order of modules]
All ranks must run the same modules in the same order. Every rank records what it runs (`OrderLog`, two list
operations per unit and pass) without communication. Only a rank that stalls makes a `Standing` from its log, and
`judge` compares those of all ranks: docs/notes/order-of-modules.md.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

KEPT = 512
"""Number of events that a log keeps."""
SHOWN = 6
"""Number of events before and after a difference that a message shows."""


class RankOrderError(RuntimeError):
    """The ranks ran different modules, or a rank has ended, so that a collective can never complete."""


@dataclass(frozen=True)
class Event:
    """One action that all ranks must perform together."""

    what: str
    """"forward", "backward" or "step"."""
    unit: str
    """Module name, empty for the model itself."""
    step: int
    """Number of optimizer steps before it."""

    def __str__(self) -> str:
        if self.what == "step":
            return "optimizer.step()"
        return f"{self.what} of {self.unit or ('gradients' if self.what == 'reduction' else 'the model')}"


class OrderLog:
    """The last events of one rank, and the message that it waits for."""

    def __init__(self) -> None:
        self.count = 0
        """Number of events since `shard`."""
        self.step = 0
        self.waiting = ""
        """The message it waits for; empty while it waits for none."""
        self.thread_id = threading.get_ident()
        """The thread that trains."""
        self._recent: deque[tuple[str, str, int]] = deque(maxlen=KEPT)

    def note(self, what: str, unit: str) -> None:
        self.count += 1
        self._recent.append((what, unit, self.step))
        if what == "step":
            self.step += 1

    def recent(self) -> tuple[Event, ...]:
        return tuple(Event(*entry) for entry in tuple(self._recent))


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The state of one stalled rank, as it reports it to the others."""

    rank: int
    count: int
    """Number of events since `shard`; the last of them is the last of `recent`."""
    recent: tuple[Event, ...]
    waiting: str
    """The message that ds_zero waits for; empty if it waits for none."""
    blocked: bool
    """Whether the rank waits for other ranks, in ds_zero or in a function of torch.distributed."""
    where: str
    """The line of the user's code at which the training thread is."""
    beat: int = 0
    """Increases with every report of the rank."""
    broken: bool = False
    """Whether a connection of the rank has broken. Such a rank cannot continue, and its process may end."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Standing:
        fields = json.loads(text)
        fields["recent"] = tuple(Event(**event) for event in fields["recent"])
        return Standing(**fields)

    def at(self, index: int) -> Event | None:
        """Returns event number `index` since `shard`, if it has happened and is kept."""
        place = index - (self.count - len(self.recent))
        return self.recent[place] if 0 <= place < len(self.recent) else None

    @property
    def step(self) -> int:
        """Number of optimizer steps before the last event."""
        return self.recent[-1].step if self.recent else 0


def first_difference(standings: Sequence[Standing]) -> int | None:
    """Returns the number of the first event that differs, among those that all logs keep; None if the shorter
    sequences are prefixes of the longer ones.
    """
    begin = max(s.count - len(s.recent) for s in standings)
    for index in range(begin, max(s.count for s in standings)):
        events = {(e.what, e.unit) for s in standings if (e := s.at(index)) is not None}
        if len(events) > 1:
            return index
    if begin > min(s.count for s in standings):  # the logs do not overlap
        return begin
    return None


def judge(standings: Mapping[int, Standing], size: int, *, patient: bool) -> str | None:
    """Returns the message of the error that every rank should raise, or None if waiting may still help.

    Args:
        standings: those of the stalled ranks; the other ranks are running.
        patient: whether ranks that ran the same events count as stuck, because enough time has passed. Before that, a
            rank that is behind may only be slow.
    """
    stalled = [standings[rank] for rank in sorted(standings)]
    if len(stalled) < size or size < 2 or not all(s.blocked for s in stalled):
        return None
    index = first_difference(stalled)
    if index is not None:
        return _differs(stalled, index)
    if patient:
        return _stands(stalled)
    return None


def _differs(stalled: Sequence[Standing], index: int) -> str:
    groups: dict[str, list[int]] = {}
    for standing in stalled:
        event = standing.at(index)
        groups.setdefault(str(event) if event else "nothing more", []).append(standing.rank)
    step = next((e.step for s in stalled if (e := s.at(index)) is not None), stalled[0].step)
    parts = "; ".join(f"{name_ranks(ranks)} ran {event}" for event, ranks in groups.items())
    lines = [
        f"ranks run modules in different order and wait for each other: in step {step}, {parts}.",
        *(_line(s, index) for s in stalled),
        "Every rank must run the same modules in the same order. If ranks choose between modules (experts, "
        "branches), add the module that contains the choice to ZeroConfig(leaf_modules=...), or run the other "
        "modules with an empty input.",
    ]
    return "\n".join(lines)


def _stands(stalled: Sequence[Standing]) -> str:
    ahead = max(s.count for s in stalled)
    behind = [s for s in stalled if s.count < ahead]
    waiting = [s for s in stalled if s.waiting]
    leaders = [s.rank for s in stalled if s.count == ahead]
    first = (
        f"{name_ranks([s.rank for s in behind])} stopped while {name_ranks(leaders)} went on"
        if behind
        else f"{name_ranks([s.rank for s in (waiting or stalled)])} wait for messages that the others do not send"
    )
    lines = [
        f"ranks wait for each other: {first}.",
        *(_line(s, min(x.count for x in stalled)) for s in stalled),
        "Every rank must run the same number of forwards, backwards and steps: give all ranks the same number of "
        "batches (DistributedSampler with drop_last=True), and call collectives on all ranks.",
    ]
    return "\n".join(lines)


def _line(standing: Standing, index: int) -> str:
    around = [(i, standing.at(i)) for i in range(index - SHOWN, index + SHOWN)]
    shown = " > ".join(f"[{e}]" if i == index else str(e) for i, e in around if e is not None) or "nothing"
    if index >= standing.count:
        shown += " > [end]"
    last = standing.recent[-1] if standing.recent else None
    wait = f"waits for {standing.waiting}" if standing.waiting else "waits"
    if not standing.blocked:
        wait = "is"
    return (
        f"  rank {standing.rank}: step {standing.step}, last {last or 'nothing'}, {wait} at {standing.where}; "
        f"order: {shown}"
    )


def lost(standings: Mapping[int, Standing], silent: Sequence[int], running: Sequence[int], error: str) -> str:
    """Returns the message for a broken connection: the process of a rank has ended, or left the group.

    Args:
        standings: those of the ranks that have answered.
        silent: ranks without an answer or a heartbeat.
        running: ranks without an answer, whose heartbeats arrive.
    """
    who = (
        f"{name_ranks(silent)} do not answer: the process or its machine has ended, has left the process group, "
        "or is busy elsewhere"
        if silent
        else "all ranks answer"
        if not running
        else f"{name_ranks(running)} did not notice it and went on running"
    )
    if silent and running:
        who += f"; {name_ranks(running)} went on running"
    return f"a message from another rank was lost ({error}); {who}.{_lines(standings)}"


def lost_store(standing: Standing, holder: str, error: str) -> str:
    """Returns the message for a broken connection after which other ranks could not be asked, because the process
    that held the store of the process group has ended, too.
    """
    return (
        f"a message from another rank was lost ({error}). Other ranks cannot be asked for the reason: the process "
        f"group's store, held by {holder}, does not answer either, so {holder} has probably ended."
        f"{_lines({0: standing})}"
    )


def _lines(standings: Mapping[int, Standing]) -> str:
    stalled = [standings[rank] for rank in sorted(standings)]
    index = min((s.count for s in stalled), default=0)
    return "".join(f"\n{_line(s, index)}" for s in stalled)


def name_ranks(ranks: Sequence[int]) -> str:
    """Formats ranks: "rank 1", "ranks 0, 2"."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
