"""Ring attention: keys and values travel around the ranks, and every rank attends to each part of them.

Each rank keeps its queries. In P steps it attends to the keys of every rank, merges outputs by their log-sum-exp, and
sends keys and values on while it computes. In backward, the gradients of keys and values travel with them and arrive
at home after P steps. A rank holds keys of two ranks at a time, so memory does not grow with the sequence of all ranks.

Sources: Liu et al., Ring Attention (arXiv:2310.01889); Brandon et al., Striped Attention (arXiv:2311.09431), for the
balance of causal attention, which here is by two parts per rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_layers.attention.blocks import attend, attend_backward, merge
from ds_layers.attention.local import expanded_heads, sdpa
from ds_layers.sequence.exchange import Traffic
from ds_layers.sequence.layout import Order
from ds_layers.sequence.ulysses import Group, compared_tokens, process_group


class RingAttention:
    """An exact `AttentionFn` over the sequence of all ranks of a group, with any number of heads."""

    def __init__(self, group: Group | None = None, *, order: Order = "contiguous") -> None:
        """Constructs the function; nothing is sent before the first call.

        Args:
            group: the ranks of the ring. Default: all ranks.
            order: which tokens each rank has (`SequenceLayout`). With "zigzag", causal attention is balanced.
        """
        if order not in ("contiguous", "zigzag"):
            raise ValueError(f"order={order!r}: it must be 'contiguous' or 'zigzag'")
        self._group = process_group(group)
        self._order = order
        self._compared = False
        self.traffic = Traffic()

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
    ) -> Tensor:
        """See `AttentionFn`. All ranks must have the same number of tokens.

        Raises:
            ValueError: an odd number of tokens in zigzag order; on every rank, if ranks have different numbers.
        """
        if self._group is None:
            return sdpa(q, k, v, causal=causal, scale=scale)
        if self._order == "zigzag" and q.shape[1] % 2:
            raise ValueError(f"{q.shape[1]} tokens on a rank: zigzag order needs two equal parts")
        if not self._compared or q.device.type == "cpu":  # as in Ulysses
            lengths = compared_tokens(q, self._group)
            if len(set(lengths)) > 1:
                raise ValueError(
                    f"the ranks of the ring have {list(lengths)} tokens: pad the sequence to a multiple of "
                    f"{len(lengths)} (SequenceBatches does so)"
                )
            self._compared = True
        ring = _Ring(self._group, causal, self._order == "zigzag", self.traffic)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out: Tensor = _RingFunction.apply(ring, scale, q, k, v)  # type: ignore[no-untyped-call]
        return out


@dataclass(frozen=True)
class _Ring:
    group: dist.ProcessGroup
    causal: bool
    zigzag: bool
    traffic: Traffic

    def work(self, step: int, tokens: int) -> Iterator[tuple[slice, slice, bool]]:
        """Yields what the queries of this rank attend to in a step: (queries, keys, whether it is causal)."""
        rank, size = self.group.rank(), self.group.size()
        source = (rank - step) % size
        everything = slice(0, tokens)
        if not self.causal:
            yield everything, everything, False
        elif not self.zigzag:
            if source <= rank:
                yield everything, everything, source == rank
        else:
            half = tokens // 2
            first, second = slice(0, half), slice(half, tokens)
            if source == rank:
                yield everything, everything, True  # both halves are in order, and the second is later
            elif source < rank:
                yield everything, first, False
            else:
                yield second, everything, False

    def rotate(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[dist.Work]]:
        """Starts to send tensors to the next rank. Returns where those of the previous rank arrive."""
        rank, size = self.group.rank(), self.group.size()
        arriving = [torch.empty_like(x) for x in tensors]
        ranks = dist.get_process_group_ranks(self.group)
        following, previous = ranks[(rank + 1) % size], ranks[(rank - 1) % size]
        operations = [dist.P2POp(dist.isend, x, following, self.group) for x in tensors]
        operations += [dist.P2POp(dist.irecv, x, previous, self.group) for x in arriving]
        self.traffic.messages += len(tensors)
        self.traffic.elements += sum(x.numel() for x in tensors)
        self.traffic.sent_bytes += sum(x.numel() * x.element_size() for x in tensors)
        return arriving, dist.batch_isend_irecv(operations)


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()


class _RingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ring: _Ring, scale: float, *inputs: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in inputs)  # heads before tokens
        size, tokens = ring.group.size(), q.shape[2]
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=wide, device=q.device)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
        keys, values = k, v
        for step in range(size):
            arriving, works = ring.rotate([keys, values]) if step + 1 < size else ([], [])
            whole_k, whole_v = _expanded(keys, q.shape[1]), _expanded(values, q.shape[1])
            for rows, columns, causal in ring.work(step, tokens):
                part, part_lse = attend(
                    q[:, :, rows], whole_k[:, :, columns], whole_v[:, :, columns], causal=causal, scale=scale
                )
                out[:, :, rows], lse[:, :, rows] = merge(out[:, :, rows], lse[:, :, rows], part, part_lse)
            _wait(works)
            if arriving:
                keys, values = arriving
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.ring, ctx.scale = ring, scale
        return result.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        grad = grads[0].transpose(1, 2).contiguous()
        ring, size, heads = ctx.ring, ctx.ring.group.size(), q.shape[1]
        wide = torch.promote_types(q.dtype, torch.float32)
        d_q = torch.zeros_like(q, dtype=wide)
        keys, values = k, v
        d_k, d_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for step in range(size):
            arriving, works = ring.rotate([keys, values]) if step + 1 < size else ([], [])
            whole_k, whole_v = _expanded(keys, heads), _expanded(values, heads)
            for rows, columns, causal in ring.work(step, q.shape[2]):
                own = (q[:, :, rows], whole_k[:, :, columns], whole_v[:, :, columns])
                parts = attend_backward(
                    grad[:, :, rows], *own, out[:, :, rows], lse[:, :, rows], causal=causal, scale=ctx.scale
                )
                d_q[:, :, rows] += parts[0]
                d_k[:, :, columns] += _summed(parts[1], k.shape[1])
                d_v[:, :, columns] += _summed(parts[2], v.shape[1])
            _wait(works)
            if arriving:
                keys, values = arriving
            # The sums travel with their keys, one step behind: after the last step they arrive at home.
            returning, works = ring.rotate([d_k, d_v])
            _wait(works)
            d_k, d_v = returning
        return None, None, *(x.to(like.dtype).transpose(1, 2) for x, like in ((d_q, q), (d_k, k), (d_v, v)))


def _expanded(x: Tensor, heads: int) -> Tensor:
    return expanded_heads(x.transpose(1, 2), heads).transpose(1, 2) if x.shape[1] != heads else x


def _summed(grad: Tensor, heads: int) -> Tensor:
    """The transpose of `_expanded`: adds the gradients of the copies of each key head."""
    if grad.shape[1] == heads:
        return grad
    total: Tensor = grad.unflatten(1, (heads, -1)).sum(2)
    return total
