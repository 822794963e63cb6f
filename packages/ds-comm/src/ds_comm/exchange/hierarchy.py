"""Ranks as a grid: those on one machine, and those with the same place on all machines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.exchange.channel import Chain, Channel, Traffic, Work


@dataclass(frozen=True, kw_only=True)
class Hierarchy:
    """The two groups of a rank. Rank r of the whole group is rank r % local of machine r // local."""

    local: dist.ProcessGroup
    """Ranks on this machine, with a fast link."""
    across: dist.ProcessGroup
    """Ranks with the same place on all machines, with a slow link."""

    @staticmethod
    def of(local_size: int, group: dist.ProcessGroup | None = None) -> Hierarchy:
        """Makes both groups. Collective over `group`, whose ranks must be in order of machines.

        Args:
            local_size: ranks on each machine.
            group: None: all ranks.
        """
        ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        if local_size < 1 or len(ranks) % local_size:
            raise ValueError(f"local_size must divide the number of ranks {len(ranks)}, but is {local_size}")
        machines = [ranks[first : first + local_size] for first in range(0, len(ranks), local_size)]
        places = [ranks[place::local_size] for place in range(local_size)]
        alone = len(ranks) == dist.get_world_size()
        return Hierarchy(local=_own(machines, alone), across=_own(places, alone))

    def destroy(self) -> None:
        """Destroys both groups."""
        dist.destroy_process_group(self.local)
        dist.destroy_process_group(self.across)


def _own(members: list[list[int]], everybody: bool) -> dist.ProcessGroup:
    """Makes groups, and returns the one that contains this rank.

    Args:
        everybody: whether all ranks of the job make them. Then each group gets a new name; otherwise torch derives the
            name from the ranks, and such a group cannot be made again after it was destroyed.
    """
    own = next(ranks for ranks in members if dist.get_rank() in ranks)
    groups = [
        dist.new_group(ranks, use_local_synchronization=not everybody)
        for ranks in (members if everybody else [own])
    ]
    made = groups[members.index(own) if everybody else 0]
    assert isinstance(made, dist.ProcessGroup)
    return made


class HierarchicalCollectives:
    """All-reduce and all-to-all that send each byte over the slow links once.

    The all-reduce reduces and scatters inside of each machine, all-reduces 1 / local of the tensor across machines, and
    gathers inside. The all-to-all exchanges inside of each machine first, so that each rank then sends one message to
    each other machine instead of one to each rank.
    """

    def __init__(self, hierarchy: Hierarchy) -> None:
        self.local = Channel(hierarchy.local)
        self.across = Channel(hierarchy.across)

    @property
    def traffic(self) -> tuple[Traffic, Traffic]:
        """Sent inside of the machine, and across machines."""
        return self.local.traffic, self.across.traffic

    def all_reduce(self, x: Tensor, *, async_op: bool = False) -> Work:
        """Adds the contiguous tensor `x` over all ranks, in place. The order of additions is fixed, and the same on all
        ranks.
        """
        size = self.local.world_size
        flat = x.view(-1)
        width = -(-flat.numel() // size)
        padded = (
            flat
            if width * size == flat.numel()
            else torch.cat([flat, flat.new_zeros(width * size - flat.numel())])
        )
        received = torch.empty_like(padded)
        nbytes = [width * x.element_size()] * size
        part = torch.empty(width, dtype=x.dtype, device=x.device)

        def across() -> Work:
            torch.sum(received.view(size, width), 0, out=part)
            return self.across.all_reduce(part)

        def gather() -> Work:
            return self.local.all_gather(padded.view(torch.uint8), part.view(torch.uint8), nbytes)

        def finish() -> None:
            if padded.data_ptr() != flat.data_ptr():
                flat.copy_(padded[: flat.numel()])

        first = self.local.all_to_all(received.view(torch.uint8), padded.view(torch.uint8), nbytes, nbytes)
        work = Chain(first, across, gather, finish)
        if not async_op:
            work.wait()
        return work

    def all_to_all(self, output: Tensor, input: Tensor, *, async_op: bool = False) -> Work:
        """Sends equal consecutive pieces of `input` to all ranks, as `dist.all_to_all_single`. Both are contiguous."""
        locals_, machines = self.local.world_size, self.across.world_size
        if input.numel() % (locals_ * machines) or output.numel() != input.numel():
            raise ValueError(
                f"all_to_all: input and output must have the same number of elements, a multiple of "
                f"{locals_ * machines} ranks, but have {input.numel()} and {output.numel()}"
            )
        piece = input.numel() // (locals_ * machines) * input.element_size()
        # By the place of the receiver, then by its machine.
        sent = input.view(-1).view(torch.uint8).view(machines, locals_, piece).transpose(0, 1).contiguous()
        inside = torch.empty_like(sent)  # by the place of the sender, then by the receiver's machine
        first = self.local.all_to_all(
            inside.view(-1), sent.view(-1), [machines * piece] * locals_, [machines * piece] * locals_
        )

        def across() -> Work:
            bundles = inside.transpose(0, 1).contiguous()  # by machine, then by the place of the sender
            sizes = [locals_ * piece] * machines
            return self.across.all_to_all(output.view(-1).view(torch.uint8), bundles.view(-1), sizes, sizes)

        work = Chain(first, across)
        if not async_op:
            work.wait()
        return work
