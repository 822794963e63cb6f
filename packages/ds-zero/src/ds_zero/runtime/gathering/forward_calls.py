"""Forward calls of units, open or waiting for their backward."""

from __future__ import annotations

import torch

from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.gathering.gather import Gatherer


class Call:
    """One forward call of a unit, and its later backward."""

    def __init__(self, unit: str, buckets: list[Bucket], begin: int) -> None:
        self.unit, self.buckets = unit, list(buckets)
        self.begin = self.end = begin
        """When the forward began and ended, counted in calls."""
        self.keep = False
        """Whether the values stay when the call is left."""
        self._task = -1

    def begins_backward(self) -> bool:
        """Whether the backward that runs meets this call for the first time."""
        task = torch._C._current_graph_task_id()
        first = task != self._task
        self._task = task
        return first


class Calls:
    """Which calls are open in forward, and which hold their buckets in backward."""

    def __init__(self, gatherer: Gatherer) -> None:
        self._gatherer = gatherer
        self._clock = 0
        self._open: list[Call] = []
        self._held: list[Call] = []

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

    def take_over(self, call: Call, *, keep_all: bool) -> None:
        """The backward of `call` begins: calls that began after its end are done, [Note: who holds a unit]."""
        done = [c for c in self._held if c.begin > call.end]
        if done:
            self._held = [c for c in self._held if c.begin <= call.end]
            for late in done:
                self._gatherer.release(late.buckets, keep=keep_all or late.keep)
        self._held.append(call)

    def leave_all(self, *, keep_all: bool) -> None:
        """Backward is over."""
        held, self._held = self._held, []
        for call in held:
            self._gatherer.release(call.buckets, keep=keep_all)

    def forget(self) -> None:
        """A backward was left by an exception; counts are void."""
        self._held.clear()
        self._open.clear()
