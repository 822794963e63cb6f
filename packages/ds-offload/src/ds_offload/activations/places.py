"""Where the bytes of moved tensors are between forward and backward."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ds_offload.activations.buffers import Buffer, HostBuffers
from ds_offload.activations.copies import Copies, Copy


class Return(Protocol):
    """Bytes on their way back to the device."""

    def poll(self) -> None:
        """Begins what can be begun now."""

    def wait(self) -> Tensor:
        """Returns them as a 1-D uint8 tensor on the device, which later work of the current stream may use.

        Raises:
            OSError, SwapError: they could not be read.
        """


class Moved(Protocol):
    """Bytes that were moved from the device."""

    def has_left(self) -> bool:
        """Whether their memory on the device is not needed any more."""

    def leave(self) -> None:
        """Makes sure that it is not needed by work after the present one of the current stream."""

    def load(self) -> Return:
        """Begins to bring them back, to new memory."""

    def free(self) -> None:
        """Gives up the bytes. Any thread may call this."""


class Place(Protocol):
    """Holds bytes of one device."""

    @property
    def in_use_bytes(self) -> int:
        """Bytes that hold moved tensors now."""

    def move(self, source: Tensor) -> Moved | None:
        """Begins to move a 1-D uint8 tensor, which must be kept until it has left; None if there is no room."""

    def close(self) -> None:
        """Frees all memory and files. What was moved is lost."""


class HostPlace:
    """Host memory."""

    def __init__(self, device: torch.device, copies: Copies, buffers: HostBuffers) -> None:
        self._device, self._copies, self._buffers = device, copies, buffers

    @property
    def in_use_bytes(self) -> int:
        """Bytes of buffers that hold moved tensors."""
        self._buffers.collect()
        return self._buffers.in_use_bytes

    def move(self, source: Tensor) -> Moved | None:
        """See `Place.move`."""
        buffer = self._buffers.take(source.numel())
        if buffer is None:
            return None
        return _OnHost(
            self._device, self._copies, self._buffers, buffer, self._copies.start(source, buffer.tensor)
        )

    def close(self) -> None:
        """Frees the memory of free buffers."""
        self._buffers.clear()


class _OnHost:
    def __init__(
        self, device: torch.device, copies: Copies, buffers: HostBuffers, buffer: Buffer, leaving: Copy
    ) -> None:
        self._device, self._copies, self._buffers, self._buffer = device, copies, buffers, buffer
        self._leaving = self._last = leaving

    def has_left(self) -> bool:
        return self._leaving.done()

    def leave(self) -> None:
        self._leaving.order()

    def load(self) -> Return:
        return self.back(torch.empty(self._buffer.tensor.numel(), dtype=torch.uint8, device=self._device))

    def back(self, out: Tensor) -> Return:
        self._last = self._copies.start(self._buffer.tensor, out)
        return Arriving(out, self._last)

    def free(self) -> None:
        self._buffers.give(self._buffer, self._last)


class Arriving:
    """A copy to the device."""

    def __init__(self, out: Tensor, copy: Copy) -> None:
        self._out, self._copy = out, copy

    def poll(self) -> None:
        """Nothing is left to begin."""

    def wait(self) -> Tensor:
        """See `Return.wait`."""
        self._copy.order()
        return self._out
