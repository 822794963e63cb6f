"""Options of `ActivationOffload`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ds_offload.nvme.options import NVMeOptions

AHEAD_BYTES = 64 << 20
"""What is read ahead by default if there are no layers."""
DISK_BUFFER_BYTES = 256 << 20
"""Default of `ActivationOptions.disk_buffer_bytes`."""


@dataclass(frozen=True, kw_only=True)
class ActivationOptions:
    """Which tensors that autograd saves for backward are moved, and where to."""

    device: Literal["cpu", "nvme"] = "cpu"
    """ "cpu": host memory, page-locked if the model is on an accelerator. "nvme": files in `nvme_path`."""
    nvme_path: str | Path | None = None
    """An existing folder on the disk. Required by "nvme"."""
    min_bytes: int = 64 << 10
    """Smaller tensors stay on the device."""
    budget_bytes: int = 0
    """Bytes of saved tensors of one forward that stay on the device: those that are saved last, because backward needs
    them first. Which ones these are is known from the forward before; in the first forward all of them are moved.
    """
    device_bytes: int | None = None
    """Limit of the device memory of the saved tensors of one forward, those on their way included. After a forward, the
    layers whose tensors stay in the next ones are chosen by `choose_layers`: as many as the limit allows. None:
    `budget_bytes` says how much stays.
    """
    prefetch_bytes: int | None = None
    """Bytes that are on their way back to the device, or wait there for their use, before backward asks for them.
    None: the tensors of the layer that backward reaches next; without layers, 64 MiB. 0: none are read ahead.
    """
    in_flight_bytes: int = 256 << 20
    """Bytes on their way from the device, whose memory is not free yet. Computation waits for the copies if there would
    be more.
    """
    max_host_bytes: int | None = None
    """Limit of host memory for moved tensors. With "cpu", tensors for which there is no room stay on the device; None:
    no limit. With "nvme", forward waits until tensors have been written; None: 256 MiB.
    """
    nvme: NVMeOptions = field(default_factory=NVMeOptions)
    """How the files are read and written."""

    @property
    def disk_buffer_bytes(self) -> int:
        """Bytes of host memory through which tensors are written to a disk."""
        return DISK_BUFFER_BYTES if self.max_host_bytes is None else self.max_host_bytes

    @property
    def leaving_bytes(self) -> int:
        """`in_flight_bytes`, of which a limit of device memory leaves a quarter."""
        limit = self.device_bytes
        return self.in_flight_bytes if limit is None else min(self.in_flight_bytes, limit // 4)

    @property
    def ahead_bytes(self) -> int:
        """`prefetch_bytes`; by default what is read ahead if there are no layers."""
        if self.prefetch_bytes is not None:
            return self.prefetch_bytes
        limit = self.device_bytes
        return AHEAD_BYTES if limit is None else min(AHEAD_BYTES, limit // 4)

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "nvme"):
            raise ValueError(f'device={self.device!r}: activations can be moved to "cpu" or "nvme"')
        if self.device == "nvme" and self.nvme_path is None:
            raise ValueError('device="nvme" needs nvme_path=, an existing folder on the disk')
        if self.device_bytes is not None and self.budget_bytes:
            raise ValueError(
                f"device_bytes={self.device_bytes} limits the tensors of one forward, and so decides how many of them "
                f"stay: leave budget_bytes={self.budget_bytes} out"
            )
        limits = ("budget_bytes", "device_bytes", "prefetch_bytes", "in_flight_bytes", "max_host_bytes")
        for name in ("min_bytes", *limits):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value}: it must not be negative")


@dataclass(kw_only=True)
class ActivationStatistics:
    """Counts of an `ActivationOffload` since it was constructed."""

    moved_tensors: int = 0
    """Pieces of memory that were moved. Tensors that share memory are moved once."""
    moved_bytes: int = 0
    kept_bytes: int = 0
    """Bytes that stayed on the device because of `budget_bytes` or `max_host_bytes`."""
    loaded_tensors: int = 0
    """Pieces that were brought back; one that is needed by several backwards is counted each time."""
    late_tensors: int = 0
    """Pieces whose way back had not begun when backward asked for them."""
