"""What each rank has run, in order, and what to conclude when ranks stand still: pure, no communication.

[Note: order of modules]
All ranks have to run the same modules in the same order. Every rank writes down what it runs (`OrderLog`, two
list operations per unit and pass) and shows it to nobody. Only a rank that stands still makes a `Standing`
of it, and `judge` compares those of all ranks: docs/notes/order-of-modules.md.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

KEPT = 512
"""Events that a rank remembers."""
SHOWN = 6
"""Events on each side of a difference that a message shows."""


class RankOrderError(RuntimeError):
    """The ranks ran different modules, or a rank stopped, so that a collective can never complete."""


@dataclass(frozen=True)
class Event:
    """One thing that all ranks have to do together."""

    what: str
    """"forward", "backward" or "step"."""
    unit: str
    """Module name, empty for the model itself."""
    step: int
    """Optimizer steps before it."""

    def __str__(self) -> str:
        if self.what == "step":
            return "optimizer.step()"
        return f"{self.what} of {self.unit or ('gradients' if self.what == 'reduction' else 'the model')}"


class OrderLog:
    """The last events of one rank, and what it waits for."""

    def __init__(self) -> None:
        self.count = 0
        """Events since `shard`."""
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
    """Where one rank stands still."""

    rank: int
    count: int
    """Events since `shard`; the last of them is the last of `recent`."""
    recent: tuple[Event, ...]
    waiting: str
    """What ds_zero waits for there; empty where it does not."""
    blocked: bool
    """Whether it waits for other ranks, in ds_zero or in a torch.distributed function."""
    where: str
    """The user's line."""
    beat: int = 0
    """Grows while the rank goes on standing there."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Standing:
        fields = json.loads(text)
        fields["recent"] = tuple(Event(**event) for event in fields["recent"])
        return Standing(**fields)

    def at(self, index: int) -> Event | None:
        """Event number `index` since `shard`, if it has happened and is remembered."""
        place = index - (self.count - len(self.recent))
        return self.recent[place] if 0 <= place < len(self.recent) else None

    @property
    def step(self) -> int:
        """Optimizer steps before the last event."""
        return self.recent[-1].step if self.recent else 0


def first_difference(standings: Sequence[Standing]) -> int | None:
    """Number of the first event, among those that all remember, that ranks do not share; None where the
    shorter sequences begin the longer ones.
    """
    begin = max(s.count - len(s.recent) for s in standings)
    for index in range(begin, max(s.count for s in standings)):
        found = {(e.what, e.unit) for s in standings if (e := s.at(index)) is not None}
        if len(found) > 1:
            return index
    if begin > min(s.count for s in standings):  # nothing remembered in common
        return begin
    return None


def judge(standings: Mapping[int, Standing], size: int, *, patient: bool) -> str | None:
    """The message with which every rank should raise, or None where waiting may still help.

    Args:
        standings: of the ranks that stand still; others are at work.
        patient: whether so much time has passed that ranks in the same order count as stuck, too: one that is
            behind may only be slow, and one that waits elsewhere may still come.
    """
    found = [standings[rank] for rank in sorted(standings)]
    if len(found) < size or size < 2 or not all(s.blocked for s in found):
        return None
    index = first_difference(found)
    if index is not None:
        return _differs(found, index)
    if patient:
        return _stands(found)
    return None


def _differs(found: Sequence[Standing], index: int) -> str:
    groups: dict[str, list[int]] = {}
    for standing in found:
        event = standing.at(index)
        groups.setdefault(str(event) if event else "nothing more", []).append(standing.rank)
    step = next((e.step for s in found if (e := s.at(index)) is not None), found[0].step)
    parts = "; ".join(f"{name_ranks(ranks)} ran {event}" for event, ranks in groups.items())
    lines = [
        f"ranks run modules in different order and wait for each other: in step {step}, {parts}.",
        *(_line(s, index) for s in found),
        "Every rank has to run the same modules in the same order. Where ranks choose (experts, branches), name "
        "the module around the choice in ZeroConfig(leaf_modules=...), or run what is not chosen with an empty "
        "input.",
    ]
    return "\n".join(lines)


def _stands(found: Sequence[Standing]) -> str:
    ahead = max(s.count for s in found)
    behind = [s for s in found if s.count < ahead]
    waiting = [s for s in found if s.waiting]
    leaders = [s.rank for s in found if s.count == ahead]
    first = (
        f"{name_ranks([s.rank for s in behind])} stopped while {name_ranks(leaders)} went on"
        if behind
        else f"{name_ranks([s.rank for s in (waiting or found)])} wait for what the others do not send"
    )
    lines = [
        f"ranks wait for each other: {first}.",
        *(_line(s, min(x.count for x in found)) for s in found),
        "Every rank has to run the same number of forwards, backwards and steps: give all ranks the same number of "
        "batches (DistributedSampler with drop_last=True), and call collectives on all ranks alike.",
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


def lost(standings: Mapping[int, Standing], size: int, error: str) -> str:
    """The message where a connection broke: some rank's process has ended, or left the group."""
    silent = [rank for rank in range(size) if rank not in standings]
    found = [standings[rank] for rank in sorted(standings)]
    index = min((s.count for s in found), default=0)
    who = (
        f"{name_ranks(silent)} do not answer: the process or its machine has ended, or it has left the process group, "
        "or is at work elsewhere"
        if silent
        else "all ranks answer"
    )
    return "\n".join(
        [f"a message from another rank was lost ({error}); {who}.", *(_line(s, index) for s in found)]
    )


def name_ranks(ranks: Sequence[int]) -> str:
    """As words: "rank 1", "ranks 0, 2"."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
