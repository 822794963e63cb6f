"""Reduce-scatter and all-reduce whose results do not depend on the backend, the topology or timing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.exchange.channel import Chain, Channel, Traffic, Work


class OrderedReduceScatter:
    """Reduce-scatter that adds in fp32 in order of rank: all pieces of a slice are sent to its owner, and added there.

    It sends the bytes of a ring, in one message to each rank. The call signature is that of FSDP2's `Comm`.
    """

    def __init__(self) -> None:
        self.traffic = Traffic()
        """Calls and bytes that this rank has sent."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a new tensor: FSDP2 asks for its buffers here."""
        return torch.empty(size, dtype=dtype, device=device)

    @torch.no_grad()
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup | None = None,
        op: Any = dist.ReduceOp.SUM,
        async_op: bool = False,
    ) -> Work | None:
        """Rank r receives the sum (or mean) over ranks of slice r of `input_tensor`."""
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ValueError(f"OrderedReduceScatter: op must be SUM or AVG, but is {op}")
        channel = Channel(group, self.traffic)
        sent = input_tensor.contiguous().view(channel.world_size, -1)
        received = torch.empty_like(sent)
        sizes = [sent.shape[1] * sent.element_size()] * channel.world_size
        first = channel.all_to_all(_bytes(received), _bytes(sent), sizes, sizes)

        def add() -> None:
            total = received[0].to(torch.float32, copy=True)
            for part in received[1:]:
                total += part
            if op == dist.ReduceOp.AVG:
                total /= channel.world_size
            output_tensor.view(-1).copy_(total)

        work = Chain(first, add)
        if async_op:
            return work
        work.wait()
        return None


class OrderedAllReduce:
    """All-reduce that adds in fp32 in order of rank; all ranks get the same bits."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._channel = Channel(group)

    @property
    def traffic(self) -> Traffic:
        """Calls and bytes that this rank has sent."""
        return self._channel.traffic

    @torch.no_grad()
    def __call__(self, x: Tensor, *, async_op: bool = False) -> Work:
        """Adds the contiguous tensor `x` over ranks, in place."""
        channel = self._channel
        flat = x.view(-1)
        width = -(-flat.numel() // channel.world_size)
        sent = flat.new_zeros(channel.world_size, width)
        sent.view(-1)[: flat.numel()] = flat
        received = torch.empty_like(sent)
        own = torch.empty(width, dtype=x.dtype, device=x.device)
        sizes = [width * x.element_size()] * channel.world_size
        first = channel.all_to_all(_bytes(received), _bytes(sent), sizes, sizes)

        def gather() -> Work:
            total = received[0].to(torch.float32, copy=True)
            for part in received[1:]:
                total += part
            own.copy_(total)
            return channel.all_gather(_bytes(sent), _bytes(own), sizes)

        def finish() -> None:
            flat.copy_(sent.view(-1)[: flat.numel()])

        work = Chain(first, gather, finish)
        if not async_op:
            work.wait()
        return work


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)
