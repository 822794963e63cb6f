"""What the planner of placements needs to know, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from ds_offload.interfaces import Tier

KINDS = ("param", "master", "grad", "state")


@dataclass(frozen=True, kw_only=True)
class BucketBytes:
    """The tensors of one bucket that a rank keeps between steps."""

    name: str
    kinds: Mapping[str, int]
    """Kind ("param", "master", "grad", "state") -> bytes. A kind that the bucket does not have, or that a store does
    not decide about, is missing."""
    copy_bytes: int = 0
    """Bytes of this rank's parameters in their compute dtype, which a step writes."""
    undo: Mapping[str, int] = field(default_factory=dict)
    """Kind ("param", "master", "state") -> bytes of its second version, if the bucket is stepped during the backward,
    in a way that can be taken back. Those of masters and states are where these are; those of parameters are on the
    disk if the parameters are, else in host memory."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes of one rank for the tensors that are placed; None: no limit."""

    device_bytes: int | None
    host_bytes: int | None
    disk_bytes: int | None = 0
    """0: there is no disk."""

    def without(self, device_bytes: int, host_bytes: int) -> Room | None:
        """Returns what is left if so many bytes are taken; None if there are fewer."""
        device = None if self.device_bytes is None else self.device_bytes - device_bytes
        host = None if self.host_bytes is None else self.host_bytes - host_bytes
        if (device is not None and device < 0) or (host is not None and host < 0):
            return None
        return replace(self, device_bytes=device, host_bytes=host)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Bytes per second of one rank, if all ranks of the machine work."""

    device: float = 2e12
    """Memory of the device, during a step."""
    host: float = 2e10
    """Memory of the host, during a step."""
    link: float = 2e10
    """Between device and host, in each direction."""
    disk_read: float = 3e9
    disk_write: float = 2e9


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one optimizer step consists of."""

    micro_batches: int = 1
    compute_s: float = 0.0
    """Seconds in which forwards and backwards hide the loading of parameters; 0 hides nothing."""
    pages_states: bool = True
    """Whether the states of the optimizer may be on a disk (element-wise optimizers)."""
    undo_limit_bytes: int | None = None
    """Limit of the memory for second versions (`BucketBytes.undo`). It is then set apart, on the host and on the
    device, because it is not known in advance for which buckets it is used. None: no limit."""
    host_reserve_bytes: int = 0
    """Host memory that the training needs besides, such as that of activations."""
    loads: int = 2
    """How often a parameter is loaded for each micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Where the kinds of one bucket are stored."""

    tiers: Mapping[str, Tier]

    def of(self, kind: str) -> Tier:
        """Returns the tier of one kind."""
        return self.tiers[kind]


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Predicted seconds of one step, by what is busy. Those of one kind of work overlap."""

    load_link: float = 0.0
    load_disk: float = 0.0
    """Loading of parameters for forward and backward."""
    host: float = 0.0
    link: float = 0.0
    disk: float = 0.0
    """The step of what is not on the device: update, gradients and parameters that cross the link, reads and writes."""
    device: float = 0.0
    """The step of what is on the device."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Seconds:
        """Returns the seconds from a sequence in the order of the fields."""
        return cls(**dict(zip((f.name for f in fields(cls)), values, strict=True)))

    def total(self, compute_s: float) -> float:
        """Returns the predicted seconds: loading is hidden behind computation, and the parts of a step overlap."""
        loading = max(0.0, max(self.load_link, self.load_disk) - compute_s)
        return loading + max(self.host, self.link, self.disk) + self.device
