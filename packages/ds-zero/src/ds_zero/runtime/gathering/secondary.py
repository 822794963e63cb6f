"""A second, nearer copy of what stage 3 divides.

[Note: secondary shards]
Stage 3 gathers a unit in forward and again in backward, each time from all ranks. With a secondary copy the first
gather after a step goes to all ranks; from what arrived, each rank keeps a part, so that the few ranks of its
secondary group (a node) together hold all of it. Until the next step every gather stays inside that group. It
costs one copy of the gathered parameters, in compute dtype, divided by the size of the group. Masters, gradients
and states stay divided among all ranks.
Source: Wang et al., ZeRO++ (2023), section 3.2 (hpZ).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_zero.comm.peer_memory import AbortFlag
from ds_zero.comm.ranks import Ranks, SimulatedGroup, discover_peers


class Secondary:
    """One bucket's part in a secondary group."""

    def __init__(self, ranks: Ranks, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        each, more = divmod(numel, ranks.size)
        self.ranks = ranks
        sizes = [each + (r < more) for r in range(ranks.size)]
        self.sizes: Sequence[int] | None = sizes if more else None
        """Elements of each rank's part; None where all are equal."""
        self._begin = sum(sizes[: ranks.rank])
        self._part = torch.zeros(sizes[ranks.rank], dtype=dtype, device=device)
        self.fresh = False
        """Whether it holds the present values."""

    @property
    def tensor(self) -> Tensor:
        """What this rank keeps."""
        return self._part

    def keep(self, whole: Tensor) -> None:
        """Take this rank's part of the whole bucket."""
        self._part.copy_(self._own(whole))
        self.fresh = True

    def make_stale(self) -> None:
        """The parameters have new values."""
        self.fresh = False

    def put(self, whole: Tensor) -> None:
        """Put this rank's part into `whole`, from where the others gather it."""
        self._own(whole).copy_(self._part)

    def _own(self, whole: Tensor) -> Tensor:
        return whole[self._begin : self._begin + len(self._part)]


def secondary_ranks(ranks: Ranks, size: int, device: torch.device, abort: AbortFlag | None) -> Ranks:
    """Groups of `size` neighbouring ranks, as this rank sees its own. Collective over `ranks`; makes a process
    group. With `abort`, they read each other's memory where they can.

    Raises:
        ValueError: a size that does not divide the number of ranks.
    """
    assert ranks.group is not None
    if isinstance(ranks.group, SimulatedGroup) and ranks.size % size == 0:
        return Ranks(ranks.group.part(size), ranks.rank % size, size, axis="secondary")
    if ranks.size % size:
        raise ValueError(
            f"secondary_ranks={size} does not divide the {ranks.size} ranks that share parameters: give a divisor, "
            "usually the number of ranks on a node"
        )
    members = dist.get_process_group_ranks(ranks.group)
    first = ranks.rank - ranks.rank % size
    group = dist.new_group(members[first : first + size], use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    near = Ranks(group, ranks.rank - first, size, axis="secondary")
    return near if abort is None else discover_peers(near, device, abort)
