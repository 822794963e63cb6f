"""Copies between the device of a model and host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Copy(Protocol):
    """A copy that has begun."""

    def done(self) -> bool:
        """Whether it has finished."""

    def wait(self) -> None:
        """Returns when it has finished: the host may use its target and change its source."""

    def order(self) -> None:
        """Makes later work of the device's current stream begin after the copy, without waiting on the host."""


class Copies(Protocol):
    """Starts copies between 1-D uint8 tensors of the same size."""

    def start(self, src: Tensor, dst: Tensor) -> Copy:
        """Begins after the present work of the device's current stream. Source and target must be kept alive, and not
        be changed, until it is done or ordered.
        """


class Finished:
    """A copy that has finished."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None

    def order(self) -> None:
        return None


class HostCopies:
    """Copies within host memory, at once."""

    def start(self, src: Tensor, dst: Tensor) -> Copy:
        """Copies."""
        dst.copy_(src)
        return Finished()


class _StreamCopy:
    def __init__(self, event: torch.Event, device: torch.device) -> None:
        self._event, self._device = event, device

    def done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()

    def order(self) -> None:
        torch.accelerator.current_stream(self._device).wait_event(self._event)


class StreamCopies:
    """Copies on a stream of an accelerator that does nothing else, so that they run beside computation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device)

    def start(self, src: Tensor, dst: Tensor) -> Copy:
        """See `Copies.start`."""
        # Memory that is copied into may have been freed by work that the current stream has not executed yet.
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            dst.copy_(src, non_blocking=True)
            event = torch.Event(device=self._device)
            event.record(self._stream)
        return _StreamCopy(event, self._device)


MakeCopies = Callable[[torch.device], Copies]


def copies_of(device: torch.device) -> Copies:
    """Returns the copies for tensors on `device`."""
    return HostCopies() if device.type == "cpu" else StreamCopies(device)
