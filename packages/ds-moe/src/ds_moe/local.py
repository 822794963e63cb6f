"""Which experts a rank holds."""

from __future__ import annotations

import torch.distributed as dist

from ds_moe.dispatch.exchange import ExpertGroup
from ds_moe.errors import ExpertParallelError


def local_experts(num_experts: int, ep_size: int, index: int | None = None) -> range:
    """Returns the indices of this rank's experts: of `ep_size` consecutive ranks, each holds an equal run.

    Args:
        index: which run this rank holds. None: by the number of the rank.

    Raises:
        ExpertParallelError: `ep_size` divides neither the experts nor the ranks.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if ep_size < 1 or num_experts % ep_size:
        raise ExpertParallelError(f"ep_size={ep_size} must divide num_experts={num_experts}")
    if world % ep_size:
        raise ExpertParallelError(
            f"ep_size={ep_size} must divide the {world} ranks of the job"
            + ("" if dist.is_initialized() else ": call torch.distributed.init_process_group first")
        )
    count = num_experts // ep_size
    if index is None:
        index = (dist.get_rank() if dist.is_initialized() else 0) % ep_size
    return range(index * count, (index + 1) * count)


def checked_group(to: ExpertGroup, ep_size: int, local: range) -> ExpertGroup:
    """Returns `to`.

    Raises:
        ExpertParallelError: it has another number of ranks than `ep_size`, or this rank should hold other experts.
    """
    if to.size != ep_size or to.rank * len(local) != local.start:
        raise ExpertParallelError(
            f"the layer was made with ep_size={ep_size} and holds experts {local.start} to {local.stop - 1}, but this "
            f"process is rank {to.rank} of {to.size} in the expert-parallel group"
        )
    return to
