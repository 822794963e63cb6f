"""Block-sparse attention by torch's kernel of dense attention, over the blocks of each row.

The keys and values of the blocks of a row are copied next to each other, and the row attends to them as to a shorter
sequence. So a row with c blocks of b tokens costs what dense attention of b queries to c b keys costs, and a copy of
2 c b vectors for 4 c b^2 products with them. Rows of all heads with equally many blocks are one call; large groups are
computed a part at a time, so that copies stay small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_layers.attention.blocks import attend, attend_backward
from ds_layers.sparse.plan import BlockPlan, RowGroup

_COPIED_NUMEL = 2**18
"""Elements of keys that are copied at a time."""


@dataclass(frozen=True)
class _Job:
    plan: BlockPlan
    scale: float
    padding: Tensor | None
    """(batch, tokens), added to the scores of each key."""


def block_sparse(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float, padding: Tensor | None = None
) -> Tensor:
    """Returns attention over the blocks of a plan: (batch, heads, tokens, head_dim).

    Args:
        q: (batch, heads, tokens, head_dim); tokens are those of the plan.
        k, v: (batch, kv_heads, tokens, head_dim).
        padding: (batch, tokens), added to the scores of each key.
    """
    out: Tensor = _BlockSparse.apply(_Job(plan, scale, padding), q, k, v)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True)
class _Part:
    """Some rows of a group, of all samples. Tensors are (batch x heads x block rows, block x dim): whole blocks are
    copied, which is several times as fast as indexing (batch, heads, block rows).
    """

    rows: Tensor
    """(batch x rows), the index of each row's queries."""
    columns: Tensor
    """(batch x rows x blocks of a row), the indices of its keys."""
    block: int
    mask: Tensor | None

    def queries(self, blocks: Tensor) -> Tensor:
        """Returns (batch x rows, 1, block, dim)."""
        return blocks.index_select(0, self.rows).view(len(self.rows), 1, self.block, -1)

    def keys(self, blocks: Tensor) -> Tensor:
        """Returns (batch x rows, 1, blocks of a row x block, dim)."""
        tokens = len(self.columns) // len(self.rows) * self.block
        return blocks.index_select(0, self.columns).view(len(self.rows), 1, tokens, -1)

    def put(self, blocks: Tensor, values: Tensor) -> None:
        """The inverse of `queries`."""
        blocks.index_copy_(0, self.rows, values.reshape(len(self.rows), -1))

    def add(self, blocks: Tensor, values: Tensor) -> None:
        """The transpose of `keys`."""
        blocks.index_add_(0, self.columns, values.reshape(len(self.columns), -1).to(blocks.dtype))


def _parts(job: _Job, q: Tensor, k: Tensor) -> Iterator[_Part]:
    batch, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    block, num_blocks = job.plan.block, q.shape[2] // job.plan.block
    samples = torch.arange(batch, device=q.device)[:, None]
    for group in job.plan.groups:
        size = max(1, _COPIED_NUMEL // (batch * group.columns.shape[1] * block * q.shape[-1]))
        for begin in range(0, len(group.rows), size):
            part = slice(begin, begin + size)
            own_heads, columns = group.heads[part].to(q.device), group.columns[part].to(q.device)
            rows = (samples * heads + own_heads) * num_blocks + group.rows[part].to(q.device)
            shared = samples * kv_heads + own_heads // (heads // kv_heads)
            index = shared[:, :, None] * num_blocks + columns
            yield _Part(rows.flatten(), index.flatten(), block, _mask(job, group, columns, q))


def _mask(job: _Job, group: RowGroup, columns: Tensor, q: Tensor) -> Tensor | None:
    """Returns what is added to the scores of some rows: (batch x rows or 1, 1, block or 1, key tokens)."""
    block, mask = job.plan.block, None
    if group.diagonal:
        mask = q.new_zeros(block, group.columns.shape[1] * block)
        later = torch.ones(block, block, dtype=torch.bool, device=q.device).triu(1)
        mask[:, -block:].masked_fill_(later, lowest(q.dtype))
        mask = mask[None, None]
    if job.padding is not None:
        own = job.padding.unflatten(1, (-1, block))[:, columns].flatten(2).flatten(0, 1)[:, None, None]
        # The sum of both must not become infinite.
        mask = own if mask is None else torch.minimum(own, mask)
    if mask is None:
        return None
    return mask.expand(len(q) * len(columns), 1, block, -1)


def lowest(dtype: torch.dtype) -> float:
    """What is added to the score of a key that does not count: finite, so that a row without keys is no NaN."""
    return torch.finfo(dtype).min / 4


def scores_of(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what is added to scores: 0 where a key counts, and `lowest` elsewhere."""
    return torch.zeros(counts.shape, dtype=dtype, device=counts.device).masked_fill_(~counts, lowest(dtype))


def _blocks(x: Tensor, block: int) -> Tensor:
    """(batch, heads, tokens, dim) -> (batch x heads x block rows, block x dim); a view of a contiguous tensor."""
    return x.reshape(-1, block * x.shape[3])


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        block = job.plan.block
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        q_blocks, k_blocks, v_blocks = (_blocks(x, block) for x in (q, k, v))
        out = q.new_empty((*q.shape[:3], v.shape[3]))
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = torch.empty((*q.shape[:3], 1), dtype=wide, device=q.device)
        for part in _parts(job, q, k):
            own = (part.queries(q_blocks), part.keys(k_blocks), part.keys(v_blocks))
            values, sums = attend(*own, causal=False, scale=job.scale, mask=part.mask)
            part.put(_blocks(out, block), values)
            part.put(_blocks(lse, block), sums)
        ctx.job = job
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        job, block = ctx.job, ctx.job.plan.block
        blocks = [_blocks(x, block) for x in (grads[0].contiguous(), q, k, v, out, lse)]
        d_q = torch.empty_like(q)
        wide = torch.promote_types(q.dtype, torch.float32)
        d_k, d_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        for part in _parts(job, q, k):
            parts = attend_backward(
                part.queries(blocks[0]),
                part.queries(blocks[1]),
                part.keys(blocks[2]),
                part.keys(blocks[3]),
                part.queries(blocks[4]),
                part.queries(blocks[5]).squeeze(-1),
                causal=False,
                scale=job.scale,
                mask=part.mask,
            )
            part.put(_blocks(d_q, block), parts[0])
            part.add(_blocks(d_k, block), parts[1])
            part.add(_blocks(d_v, block), parts[2])
        return None, d_q, d_k.to(k.dtype), d_v.to(v.dtype)
