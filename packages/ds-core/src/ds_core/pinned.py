"""Page-locked host memory: for copies to and from an accelerator, or so that it is never swapped out.

It comes from the arena, on huge pages where the system has them, and whole pages are locked. torch's allocator of
pinned memory rounds sizes up to powers of two, which takes up to 1.99 times as much.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ds_core import _gpu, _native, arena, host_limits


@dataclass(frozen=True, kw_only=True)
class Pinning:
    """How memory is locked."""

    mode: Literal["device", "torch", "mlock", "plain"]
    """"device": registered with the devices by the GPU library of ds_core. "torch": from torch's pinned allocator.
    "mlock": locked by the system. "plain": not locked."""
    reason: str = ""
    """Why it is not "device"; empty if it is."""


def choose(wanted: bool, device_type: str) -> Pinning:
    """Returns how memory is locked for copies to and from a device.

    Args:
        wanted: False: it is not locked.
        device_type: such as "cuda"; "cpu": there is no accelerator.
    """
    if not wanted:
        return Pinning(mode="plain", reason="pin_memory is false")
    if device_type == "cpu":
        return Pinning(mode="plain", reason="there is no accelerator, so nothing is copied to one")
    reason = _gpu.reason_against(device_type)
    if not reason:
        return Pinning(mode="device")
    return Pinning(mode="torch", reason=f"{reason}; torch rounds sizes up to powers of two")


def empty(numel: int, dtype: torch.dtype, pinning: Pinning) -> Tensor:
    """Returns a 1-D CPU tensor with undefined values. If its memory cannot be locked, it is not, and a warning says
    why.

    Raises:
        NotEnoughMemory: with "mlock", more than `ulimit -l` permits; nothing was allocated.
        MemoryError: the system has no more memory for this process.
    """
    num_bytes = numel * dtype.itemsize
    if pinning.mode == "torch":
        return torch.empty(numel, dtype=dtype, pin_memory=True)
    if pinning.mode == "plain" or not num_bytes or not _native.has_native():
        return arena.empty(numel, dtype)
    if pinning.mode == "mlock":
        host_limits.require("page-locked memory", num_bytes, host_limits.pinned_limits())
    try:
        block = _native.core.LockedBlock(num_bytes, pinning.mode == "device")
    except RuntimeError as error:
        warnings.warn(
            f"{num_bytes:,} bytes of host memory could not be page-locked ({error}): they are used as they are, and "
            "copies to the device are slower",
            stacklevel=2,
        )
        return arena.empty(numel, dtype)
    return torch.frombuffer(block, dtype=dtype, count=numel)


def locked_bytes() -> int:
    """Returns the bytes that tensors of `empty` keep locked in this process, apart from torch's."""
    return _native.core.locked_bytes() if _native.has_native() else 0
