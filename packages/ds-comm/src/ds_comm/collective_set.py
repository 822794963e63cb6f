"""The collectives that a sharding package uses, as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ds_comm.exchange.checked import checked as checked_connect
from ds_comm.frozen import QuantizedFrozen
from ds_comm.interfaces import Abort, Transport
from ds_comm.log import CommsLog
from ds_comm.same_host.peer_memory import connect

Connect = Callable[[dist.ProcessGroup, torch.device, Abort], Transport | None]
"""Finds the ranks of a group with which tensors are exchanged without messages. Collective."""


@dataclass(frozen=True, kw_only=True)
class Collectives:
    """What `ds_zero.shard(comm=...)` takes."""

    all_gather: Any = None
    """An all-gather with the signature of FSDP2's `Comm`; None: that of the package that uses this object."""
    reduce_scatter: Any = None
    """A reduce-scatter with the signature of FSDP2's `Comm`; None: that of the package that uses this object."""
    axes: Mapping[str, Collectives] = field(default_factory=dict)
    """Other collectives for some axes of the mesh, by their names: "data", "replicate", "expert" or "secondary". Their
    own `axes` and `connect` have no effect."""
    connect: Connect | None = connect
    """The transport between ranks on one machine; None: they send messages."""
    log: CommsLog | None = None
    """Records what is gathered and reduced; None: nothing does."""
    frozen: QuantizedFrozen | None = None
    """Keeps and gathers frozen parameters at stage 3; None: they are treated as the others."""


def collectives(
    *,
    all_gather: Any = None,
    reduce_scatter: Any = None,
    axes: Mapping[str, Collectives] | None = None,
    log: CommsLog | None = None,
    frozen: QuantizedFrozen | None = None,
    checked: bool = False,
) -> Collectives:
    """Returns collectives for `ds_zero.shard(comm=...)`: ranks on one machine read each other's memory where the system
    permits it ([Note: peer memory]), and other ranks send messages. The results have the same bits.

    Args:
        all_gather: an all-gather to use instead of the one of ds_zero, with the signature of FSDP2's `Comm`.
        reduce_scatter: the same for the reduce-scatter.
        axes: collectives for some axes of the mesh, by name.
        log: records what is gathered and reduced.
        frozen: keeps and gathers frozen parameters in 8 bits at stage 3.
        checked: compare checksums of what ds_zero's own collectives receive, [Note: checked messages]. On the CPU only,
            and not with collectives that are given here.
    """
    way = checked_connect(connect) if checked else connect
    return Collectives(
        all_gather=all_gather,
        reduce_scatter=reduce_scatter,
        axes=dict(axes or {}),
        connect=way,
        log=log,
        frozen=frozen,
    )
