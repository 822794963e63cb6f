"""Tensors that lie in one buffer, and the reduction of gradients at full precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_comm.compress.blocks import Blocks
from ds_comm.exchange.channel import Channel

BUCKET_NUMEL = 1 << 25
"""Elements that a reduction at full precision copies into one buffer. Larger ones would gain nothing: at 128 MB the
time of a message is that of its bytes."""


class FlatLayout:
    """Where each tensor of a list lies in a 1-D buffer."""

    def __init__(self, tensors: Sequence[Tensor], block_numel: int) -> None:
        self.shapes = [tensor.shape for tensor in tensors]
        self.numels = [tensor.numel() for tensor in tensors]
        self.blocks, self.offsets = Blocks.of(self.numels, block_numel)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Returns the part of `buffer` that belongs to each tensor, in its shape."""
        return [
            buffer[offset : offset + numel].view(shape)
            for offset, numel, shape in zip(self.offsets, self.numels, self.shapes, strict=True)
        ]


def reduced(
    grads: Sequence[Tensor], channel: Channel, factor: float, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Returns the sums over ranks of `grads * factor`, as new fp32 tensors of the same shapes, not divided by the
    number of ranks. One collective for each `BUCKET_NUMEL` elements, and at most one for each tensor that is larger.

    Args:
        dtype: in which gradients are sent and summed; 16 bits need a second buffer.
    """
    sums: list[Tensor] = []
    first, pending = 0, []
    while first < len(grads):
        last, numel = first, 0
        while last < len(grads) and (last == first or numel + grads[last].numel() <= BUCKET_NUMEL):
            numel += grads[last].numel()
            last += 1
        members = grads[first:last]
        buffer = torch.empty(numel, dtype=torch.float32, device=members[0].device)
        for grad, part in zip(members, buffer.split([g.numel() for g in members]), strict=True):
            view = part.view(grad.shape)
            view.copy_(grad)
            sums.append(view)
        if factor != 1.0:
            buffer.mul_(factor)
        sent = buffer.to(dtype)
        pending.append((channel.all_reduce(sent), sent, buffer))
        first = last
    for work, sent, buffer in pending:
        work.wait()
        if sent is not buffer:
            buffer.copy_(sent)
    return sums
