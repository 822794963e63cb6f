"""Host memory for tensors that were moved; it is reused from step to step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ds_offload.activations.copies import Copy
from ds_offload.host import host_memory

_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class Buffer:
    """A piece of host memory of `HostBuffers`."""

    memory: Tensor
    """1-D, uint8; all of it."""
    tensor: Tensor
    """The part of `memory` that was asked for."""


class HostBuffers:
    """Buffers of host memory, page-locked if `device` is an accelerator.

    Free buffers are kept for tensors of the same size, as those of the next step are. They never make the total larger
    than the largest total that was in use at one time.
    """

    def __init__(
        self,
        device: torch.device,
        max_bytes: int | None = None,
        *,
        allocate: Callable[[int], Tensor] | None = None,
    ) -> None:
        """
        Args:
            allocate: returns so many bytes of memory, as a 1-D uint8 tensor. Default: `host_memory`.
        """
        self._allocate = allocate or partial(host_memory, dtype=torch.uint8, device=device)
        self.max_bytes = max_bytes
        self.in_use_bytes = 0
        """Bytes of buffers that were taken and not given back."""
        self.held_bytes = 0
        """Bytes of all buffers, free ones included."""
        self._peak_bytes = 0
        self._free: dict[int, list[Tensor]] = {}
        # Buffers are given back by whichever thread releases a graph, maybe in the middle of `take`: so they only wait
        # here, in a container whose operations are atomic.
        self._returned: deque[tuple[Buffer, Copy | None]] = deque()

    def take(self, num_bytes: int, *, over_limit: bool = False) -> Buffer | None:
        """Returns a buffer with undefined values; None if the limit allows no more.

        Args:
            over_limit: return a buffer also if the limit does not allow it.
        """
        self.collect()
        size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        if self.max_bytes is not None and self.in_use_bytes + size > self.max_bytes and not over_limit:
            return None
        self.in_use_bytes += size
        self._peak_bytes = max(self._peak_bytes, self.in_use_bytes)
        same = self._free.get(size)
        if same:
            memory = same.pop()
        else:
            self._shrink(self._peak_bytes - size)
            memory = self._allocate(size)
            self.held_bytes += size
        return Buffer(memory, memory[:num_bytes])

    def give(self, buffer: Buffer, after: Copy | None = None) -> None:
        """Takes a buffer back. It is reused when the copy `after` is done. Any thread may call this."""
        self._returned.append((buffer, after))

    def collect(self) -> None:
        """Takes note of the buffers that were given back."""
        while self._returned:
            buffer, after = self._returned.popleft()
            if after is not None:
                after.wait()
            size = buffer.memory.numel()
            self.in_use_bytes -= size
            self._free.setdefault(size, []).append(buffer.memory)

    def clear(self) -> None:
        """Frees the memory of free buffers."""
        self.collect()
        self._shrink(0)

    def _shrink(self, limit: int) -> None:
        """Frees memory of free buffers until at most `limit` bytes are held, or none are free."""
        for size in list(self._free):
            buffers = self._free[size]
            while buffers and self.held_bytes > limit:
                buffers.pop()
                self.held_bytes -= size
            if not buffers:
                del self._free[size]
