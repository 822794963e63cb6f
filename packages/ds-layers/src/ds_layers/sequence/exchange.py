"""All-to-all between "all heads of some tokens" and "some heads of all tokens"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ds_layers.sequence.head_plan import Ranges


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has elements; plans run a model with tensors that have none, on the meta device or fake ones."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


@dataclass
class Traffic:
    """What this rank has sent to other ranks, in forward and backward."""

    messages: int = 0
    """Number of collectives."""
    elements: int = 0
    sent_bytes: int = 0


@dataclass(frozen=True)
class Exchange:
    """One exchange among the ranks of a group."""

    group: dist.ProcessGroup
    lengths: tuple[int, ...]
    """Number of tokens of each rank."""
    traffic: Traffic

    @property
    def rank(self) -> int:
        return self.group.rank()

    def to_heads(self, tensors: Sequence[Tensor], ranges: Sequence[Ranges]) -> list[Tensor]:
        """Returns, for each tensor, this rank's heads of the tokens of all ranks.

        Args:
            tensors: (batch, own tokens, heads, head_dim).
            ranges: for each tensor, the heads that each rank receives.
        """
        parts = [
            [
                x[:, :, begin:end]
                for x, heads in zip(tensors, ranges, strict=True)
                for begin, end in [heads[p]]
            ]
            for p in range(len(self.lengths))
        ]
        own = [heads[self.rank][1] - heads[self.rank][0] for heads in ranges]
        shapes = [
            [(x.shape[0], length, count, x.shape[3]) for x, count in zip(tensors, own, strict=True)]
            for length in self.lengths
        ]
        received = self._all_to_all(parts, shapes)
        return [torch.cat([part[i] for part in received], 1) for i in range(len(tensors))]

    def to_tokens(
        self, tensors: Sequence[Tensor], ranges: Sequence[Ranges], counts: Sequence[int]
    ) -> list[Tensor]:
        """The transpose of `to_heads`: returns all heads of this rank's tokens. Heads that several ranks have are
        added.

        Args:
            tensors: (batch, tokens of all ranks, own heads, head_dim).
            ranges: for each tensor, the heads that each rank has.
            counts: for each tensor, the number of heads of all ranks together.
        """
        pieces = [x.split(self.lengths, 1) for x in tensors]
        parts = [[piece[p] for piece in pieces] for p in range(len(self.lengths))]
        mine = self.lengths[self.rank]
        shapes = [
            [
                (x.shape[0], mine, heads[p][1] - heads[p][0], x.shape[3])
                for x, heads in zip(tensors, ranges, strict=True)
            ]
            for p in range(len(self.lengths))
        ]
        received = self._all_to_all(parts, shapes)
        whole = []
        for i, (x, heads, count) in enumerate(zip(tensors, ranges, counts, strict=True)):
            if sum(end - begin for begin, end in heads) == count:
                whole.append(torch.cat([part[i] for part in received], 2))
                continue
            total = x.new_zeros((x.shape[0], mine, count, x.shape[3]))
            for part, (begin, end) in zip(received, heads, strict=True):
                total[:, :, begin:end] += part[i]
            whole.append(total)
        return whole

    def _all_to_all(
        self, parts: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]]
    ) -> list[list[Tensor]]:
        """Sends `parts[p]` to rank p in one message. Returns what each rank sent, with `shapes[p]` from rank p."""
        sizes = [sum(x.numel() for x in part) for part in parts]
        expected = [[torch.Size(shape).numel() for shape in own] for own in shapes]
        packed = torch.cat([x.reshape(-1) for part in parts for x in part])
        out = packed.new_empty(sum(map(sum, expected)))
        dist.all_to_all_single(out, packed, [sum(own) for own in expected], sizes, group=self.group)
        sent = sum(sizes) - sizes[self.rank]
        self.traffic.messages += 1
        self.traffic.elements += sent
        self.traffic.sent_bytes += sent * packed.element_size()
        return [
            [flat.view(shape) for flat, shape in zip(piece.split(own_sizes), own_shapes, strict=True)]
            for piece, own_sizes, own_shapes in zip(
                out.split([sum(own) for own in expected]), expected, shapes, strict=True
            )
        ]


class ToHeads(torch.autograd.Function):
    """`Exchange.to_heads`; its backward is `Exchange.to_tokens`."""

    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, ranges: tuple[Ranges, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.ranges, ctx.counts = exchange, ranges, [x.shape[2] for x in tensors]
        return tuple(exchange.to_heads(tensors, ranges))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *ctx.exchange.to_tokens(grads, ctx.ranges, ctx.counts)


class ToTokens(torch.autograd.Function):
    """`Exchange.to_tokens` for heads that only one rank has; its backward is `Exchange.to_heads`."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, ranges: Ranges, count: int, tensor: Tensor) -> Tensor:
        ctx.exchange, ctx.ranges = exchange, ranges
        return exchange.to_tokens([tensor], [ranges], [count])[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, None, ctx.exchange.to_heads(grads, [ctx.ranges])[0]
