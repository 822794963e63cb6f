"""Measures the memory that a part of a program allocates, event by event; the reference for tests of `ds_zero.plan`.

On the CPU every allocation and release of torch's allocator is an event of torch's profiler; their running sum is
exact to the byte, where resident memory depends on pages, arenas of the C library and the past. On an accelerator
the allocator keeps the counts itself.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from ds_zero.tensors.placeholder import Placeholder
from ds_zero.tensors.storage import is_fake

_MARK = "ds.counted/"


def _nothing() -> int:
    return 0


class counted_memory:
    """A context manager that counts torch's allocations inside it, starting from zero. Earlier allocations are not
    counted, so enter it before the model is constructed.

    `mark(name)` begins a phase; phases of the same name are combined. After the context, `peak_bytes` is the peak and
    `phase_bytes` the peak of each phase. It records a profiler event for every operation, so use it for a few steps
    only.

    Args:
        native_bytes: returns the bytes held outside of torch's allocator, for example `lambda:
            ds_core.arena.stats().in_use_bytes`. It is called at the start, which counts as zero, and at the end of
            every phase.
        device: the device to measure. On an accelerator, the result is the peak of its allocator minus the bytes held
            at the start.
    """

    def __init__(
        self, native_bytes: Callable[[], int] = _nothing, device: torch.device | str = "cpu"
    ) -> None:
        self._native, self._device = native_bytes, torch.device(device)
        self._names: list[str] = []
        self._held: list[int] = []
        """Result of `native_bytes` at the end of each phase."""
        self._open: record_function | None = None
        self._profile: profile | None = None
        self._start = 0
        self._peaks: list[int] = []

    def __enter__(self) -> counted_memory:
        self._start = self._native()
        if self._device.type == "cpu":
            # Ended by mark or exit: nothing else opens and closes between them.
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
            self._profile.__enter__()
        else:
            self._base = torch.accelerator.memory_allocated(self._device)
        self.mark("start")
        return self

    def mark(self, name: str) -> None:
        """Begins a new phase."""
        self._end_phase()
        self._names.append(name)
        if self._profile is not None:
            self._open = record_function(f"{_MARK}{len(self._names) - 1}")
            self._open.__enter__()
        else:
            torch.accelerator.reset_peak_memory_stats(self._device)

    def _end_phase(self) -> None:
        if not self._names:
            return
        self._held.append(self._native() - self._start)
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None
        else:
            torch.accelerator.synchronize(self._device)
            self._peaks.append(torch.accelerator.max_memory_allocated(self._device) - self._base)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_phase()
        if self._profile is not None:
            self._profile.__exit__(kind, error, trace)
            if error is None:
                self._peaks = _peaks(self._profile, len(self._names))
            self._profile = None

    @property
    def phase_bytes(self) -> Mapping[str, int]:
        """Name of a phase -> its peak of allocated bytes."""
        peaks: dict[str, int] = {}
        for name, peak, held in zip(self._names, self._peaks, self._held, strict=True):
            peaks[name] = max(peaks.get(name, 0), peak + held)
        return peaks

    @property
    def peak_bytes(self) -> int:
        """Peak of allocated bytes over all phases."""
        return max(self.phase_bytes.values())


def _peaks(recorded: profile, num_phases: int) -> list[int]:
    """Returns the maximum allocated bytes in each phase.

    [Note: unrecorded releases]
    The profiler records events of the thread that started it and of autograd's threads. A release in another thread,
    such as gloo's after a broadcast, is not recorded, so that the block would seem to be allocated for ever. Such
    blocks are excluded. They are recognised by another allocation at the same address, or because no tensor uses them
    at the end.
    """
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    blocks: list[_Block] = []
    marks: list[tuple[int, int]] = []
    live: dict[int, _Block] = {}
    for event in sorted(_flat(results.experimental_event_tree()), key=lambda e: e.start_time_ns):
        if event.name.startswith(_MARK):
            marks.append((event.start_time_ns, int(event.name.removeprefix(_MARK))))
        elif event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            fields = event.extra_fields
            if fields.alloc_size > 0:
                if fields.ptr in live:
                    live.pop(fields.ptr).seen = False
                live[fields.ptr] = _Block(fields.alloc_size, event.start_time_ns)
                blocks.append(live[fields.ptr])
            elif fields.ptr in live:
                live.pop(fields.ptr).end = event.start_time_ns
    known = _addresses() if live else set()
    for pointer, block in live.items():
        block.seen = pointer in known
    return _maxima(blocks, marks, num_phases)


@dataclass
class _Block:
    """One allocation and its lifetime."""

    num_bytes: int
    begin: int
    end: float = math.inf
    seen: bool = True


def _flat(events: Sequence[Any]) -> Iterator[Any]:
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        yield event


def _addresses() -> set[int]:
    """Returns the addresses of live tensors."""
    addresses = set()
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is None or isinstance(tensor, Placeholder) or is_fake(tensor):
                    continue
                if tensor.device.type == "cpu":
                    with contextlib.suppress(
                        RuntimeError
                    ):  # of wrappers of other tensors, which have no memory
                        addresses.add(tensor.untyped_storage().data_ptr())
    return addresses


def _maxima(blocks: list[_Block], marks: list[tuple[int, int]], num_phases: int) -> list[int]:
    changes: list[tuple[float, int]] = []
    for block in blocks:
        if block.seen:
            changes += [(block.begin, block.num_bytes), (block.end, -block.num_bytes)]
    changes.sort()  # at equal times what is released goes first
    peaks = [0] * num_phases
    held = at = 0
    for (begin, phase), end in zip(marks, [*(m[0] for m in marks[1:]), math.inf], strict=True):
        while at < len(changes) and changes[at][0] < begin:
            held += changes[at][1]
            at += 1
        peaks[phase] = held
        while at < len(changes) and changes[at][0] < end:
            held += changes[at][1]
            peaks[phase] = max(peaks[phase], held)
            at += 1
    return peaks
