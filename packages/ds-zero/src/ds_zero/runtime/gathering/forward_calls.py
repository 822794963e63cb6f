"""Forward calls of units: those that are running, and those whose backward is running."""

from __future__ import annotations

import torch

from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.gathering.gather import Gatherer


class Call:
    """One forward call of a unit, and the backward of this call."""

    def __init__(self, unit: str, buckets: list[Bucket], begin: int) -> None:
        self.unit, self.buckets = unit, list(buckets)
        self.begin = self.end = begin
        """Logical times of the start and end of the forward; every start and end of a call increases the time by 1."""
        self.keep = False
        """Whether the buckets stay gathered after the call."""
        self._task = -1

    def begins_backward(self) -> bool:
        """Whether this is the first call of the method in the running backward."""
        task = torch._C._current_graph_task_id()
        first = task != self._task
        self._task = task
        return first


class Calls:
    """The calls whose forward is running, and those that keep their buckets gathered in backward."""

    def __init__(self, gatherer: Gatherer) -> None:
        self._gatherer = gatherer
        self._clock = 0
        self._open: list[Call] = []
        """Calls whose forward is running, outer ones first."""
        self._held: list[Call] = []
        """Calls whose backward is running."""

    def begin(self, unit: str, buckets: list[Bucket]) -> Call:
        self._clock += 1
        call = Call(unit, buckets, self._clock)
        self._open.append(call)
        return call

    def end(self, call: Call) -> None:
        self._clock += 1
        call.end = self._clock
        while self._open and self._open.pop() is not call:
            pass

    @property
    def outermost(self) -> Call | None:
        return self._open[0] if self._open else None

    @property
    def none_open(self) -> bool:
        return not self._open

    def begin_backward(self, call: Call, *, keep_all: bool) -> None:
        """Called when the backward of `call` begins. Releases the buckets of calls that began after its end, because
        their backward is over, [Note: lifetime of a gathered unit].
        """
        done = [c for c in self._held if c.begin > call.end]
        if done:
            self._held = [c for c in self._held if c.begin <= call.end]
            for late in done:
                self._gatherer.release(late.buckets, keep=keep_all or late.keep)
        self._held.append(call)

    def end_backward(self, *, keep_all: bool) -> None:
        """Releases the buckets of all calls at the end of backward."""
        held, self._held = self._held, []
        for call in held:
            self._gatherer.release(call.buckets, keep=keep_all)

    def forget(self) -> None:
        """Forgets all calls after a backward that raised; the caller resets the counts of the gatherer."""
        self._held.clear()
        self._open.clear()
