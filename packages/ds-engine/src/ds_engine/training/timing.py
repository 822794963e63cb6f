"""`wall_clock_breakdown` and `memory_breakdown`: time of the parts of a step, and memory after them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from ds_engine.device import memory_bytes, peak_bytes, synchronize

FORWARD, BACKWARD, STEP = "forward", "backward", "step"
PARTS = (FORWARD, BACKWARD, STEP)


def named(part: str) -> contextlib.AbstractContextManager[object]:
    """Range `ds.engine.<part>` in the profile that is being recorded; costs nothing if there is none."""
    if not torch._C._autograd._profiler_enabled():
        return contextlib.nullcontext()
    return torch.profiler.record_function(f"ds.engine.{part}")


class Breakdown:
    """Measures the parts of a step. Turned off, it does nothing and does not synchronise.

    With times on, it synchronises the accelerator before and after each part. The times then add up, but parts no
    longer overlap, so the step is slower.
    """

    def __init__(
        self,
        *,
        time_on: bool,
        memory_on: bool,
        device: torch.device,
        every: int,
        write: Callable[[str], None],
    ) -> None:
        self.time_on, self.memory_on = time_on, memory_on
        self.device, self._every, self._write = device, max(every, 1), write
        self._step_ms = dict.fromkeys(PARTS, 0.0)
        self._sums_ms = dict.fromkeys(PARTS, 0.0)
        self._steps = 0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context manager around one part; the times of all micro-batches of a step are added."""
        if not self.time_on and not self.memory_on:
            yield
            return
        synchronize(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self.device)
            self._step_ms[name] += (time.perf_counter() - start) * 1e3
            if self.memory_on:
                self._write(f"memory after {name}: {memory(self.device)}")

    def end_step(self, step: int) -> dict[str, float]:
        """Returns the milliseconds of each part of the step that has ended, and prints means every `steps_per_print`
        steps.
        """
        if not self.time_on:
            return {}
        done, self._step_ms = self._step_ms, dict.fromkeys(PARTS, 0.0)
        self._steps += 1
        for name, value in done.items():
            self._sums_ms[name] += value
        if step % self._every == 0:
            means = ", ".join(f"{name} {self._sums_ms[name] / self._steps:.2f}" for name in PARTS)
            self._write(f"step {step}: milliseconds a step, mean of {self._steps}: {means}")
            self._sums_ms, self._steps = dict.fromkeys(PARTS, 0.0), 0
        return done


def memory(device: torch.device) -> str:
    """Describes current and peak memory in MiB: of the device's allocator, or, on a CPU, of the process."""
    held = memory_bytes(device)
    if device.type != "cpu":
        return f"{held / 2**20:.0f} MiB allocated, {peak_bytes(device) / 2**20:.0f} at most"
    return f"{held / 2**20:.0f} MiB resident, {peak_bytes(device) / 2**20:.0f} at most"
