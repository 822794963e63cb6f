"""A secondary copy of the parameters that stage 3 shards, within a small group of ranks.

[Note: secondary shards]
Stage 3 gathers a unit in forward and again in backward, each time from all ranks. With secondary shards only the first
gather after a step is from all ranks. Each rank keeps a part of the result, so that the ranks of its secondary group
(usually one node) together have a copy of all parameters. Until the next step, all other gathers are within that group.
The memory per rank is that of the parameters in the compute dtype, divided by the size of the group. Masters, gradients
and optimizer states stay sharded over all ranks.
Source: Wang et al., ZeRO++ (2023), section 3.2 (hpZ).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_zero.comm.ranks import Ranks, SimulatedGroup


class Secondary:
    """This rank's secondary shard of one bucket."""

    def __init__(self, ranks: Ranks, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        each, more = divmod(numel, ranks.size)
        self.ranks = ranks
        sizes = [each + (r < more) for r in range(ranks.size)]
        self.sizes: Sequence[int] | None = sizes if more else None
        """Number of elements of each rank's part; None if all are equal."""
        self._begin = sum(sizes[: ranks.rank])
        self._part = torch.zeros(sizes[ranks.rank], dtype=dtype, device=device)
        self.fresh = False
        """Whether the part has the present values of the parameters."""

    @property
    def tensor(self) -> Tensor:
        """This rank's part, 1-D."""
        return self._part

    def keep(self, whole: Tensor) -> None:
        """Stores this rank's part of the gathered bucket."""
        self._part.copy_(self._own(whole))
        self.fresh = True

    def make_stale(self) -> None:
        """Called when the parameters have new values."""
        self.fresh = False

    def put(self, whole: Tensor) -> None:
        """Copies this rank's part into `whole`, before an all-gather within the group."""
        self._own(whole).copy_(self._part)

    def _own(self, whole: Tensor) -> Tensor:
        return whole[self._begin : self._begin + len(self._part)]


def secondary_ranks(ranks: Ranks, size: int) -> Ranks:
    """Creates process groups of `size` consecutive ranks, and returns this rank's group. Collective over `ranks`.

    Raises:
        ValueError: `size` does not divide the number of ranks.
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
    # torch names a group that only its own ranks create by these ranks, and such a group cannot be created again after
    # it was destroyed. So all groups are created by all ranks where all ranks of the job are here.
    everybody = len(members) == dist.get_world_size()
    groups = {
        begin: dist.new_group(members[begin : begin + size], use_local_synchronization=not everybody)
        for begin in (range(0, len(members), size) if everybody else (first,))
    }
    group = groups[first]
    assert isinstance(group, dist.ProcessGroup)
    return Ranks(group, ranks.rank - first, size, axis="secondary")
