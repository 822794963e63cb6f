"""Ulysses: each rank computes attention of some heads over the whole sequence.

Ranks hold different tokens of the same samples. Before attention, an all-to-all exchanges "all heads of my tokens" for
"my heads of all tokens"; after it, another one returns the outputs. In one pass a rank sends
(2 + 2 kv / q) N h (P - 1) / P^2 elements, for N tokens of h = heads x head_dim elements on P ranks, with kv key heads
for q query heads.

Source: Jacobs et al., DeepSpeed Ulysses (arXiv:2309.14509), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ds_layers.attention.local import sdpa
from ds_layers.interfaces import AttentionFn
from ds_layers.sequence.exchange import Exchange, ToHeads, ToTokens, Traffic, has_values
from ds_layers.sequence.head_plan import plan_heads

Group = dist.ProcessGroup | DeviceMesh


class HeadExchange:
    """Wraps attention functions into the exchange of tokens for heads, for tensors (batch, tokens, heads, head_dim)."""

    def __init__(self, group: Group | None, *, uneven_tokens: bool = False) -> None:
        """See `Ulysses`."""
        self.group = process_group(group)
        self.uneven_tokens = uneven_tokens
        self.traffic = Traffic()
        self._compared = False

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.group.size() if self.group is not None else 1

    def __call__(
        self, attention: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Returns `attention(q, k, v)` of the sequence of all ranks, for this rank's tokens.

        Args:
            attention: called with this rank's heads of all tokens.

        Raises:
            ValueError: shapes that do not fit; on every rank, if ranks have different numbers of tokens.
        """
        _check_shapes(q, k, v)
        if self.group is None:
            return attention(q, k, v)
        exchange = Exchange(self.group, self._lengths(q), self.traffic)
        plan = plan_heads(q.shape[2], k.shape[2], self.size)
        own_q, own_k, own_v = ToHeads.apply(exchange, (plan.queries, plan.keys, plan.keys), q, k, v)  # type: ignore[no-untyped-call]
        expansion = plan.expansion(exchange.rank)
        if expansion is not None:
            index = torch.tensor(expansion, device=q.device)
            own_k, own_v = own_k.index_select(2, index), own_v.index_select(2, index)
        out = attention(own_q, own_k, own_v)
        if out.shape[:3] != own_q.shape[:3]:
            raise ValueError(
                f"the local attention returned {tuple(out.shape)} for queries of {tuple(own_q.shape)}: it must return "
                "(batch, tokens, heads, head_dim)"
            )
        whole: Tensor = ToTokens.apply(exchange, plan.queries, q.shape[2], out)  # type: ignore[no-untyped-call]
        return whole

    def _lengths(self, q: Tensor) -> tuple[int, ...]:
        """Returns the number of tokens of each rank. Collective if they are compared."""
        # Where asking the device would wait for it, only the first call compares.
        if self._compared and not self.uneven_tokens and q.device.type != "cpu":
            return (q.shape[1],) * self.size
        assert self.group is not None
        lengths = compared_tokens(q, self.group)
        if len(set(lengths)) > 1 and not self.uneven_tokens:
            raise ValueError(
                f"the sequence-parallel ranks have {list(lengths)} tokens: pad the sequence to a multiple of "
                f"{self.size} (SequenceBatches does so), or pass uneven_tokens=True"
            )
        self._compared = True
        return lengths


def compared_tokens(q: Tensor, group: dist.ProcessGroup) -> tuple[int, ...]:
    """Returns the number of tokens of each rank. Collective.

    Raises:
        ValueError: on every rank, if batch sizes or numbers of heads differ.
    """
    if not has_values(q):  # all ranks are assumed to have as many
        return (q.shape[1],) * group.size()
    mine = torch.tensor(q.shape[:3], device=q.device)
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(gathered, mine, group=group)
    batches, lengths, heads = zip(*(row.tolist() for row in gathered), strict=True)
    for name, counts in (("samples", batches), ("heads", heads)):
        if len(set(counts)) > 1:
            raise ValueError(
                f"the sequence-parallel ranks have {list(counts)} {name}: ranks that share sequences must have the "
                "same samples, and all heads of their tokens"
            )
    return tuple(lengths)


class Ulysses:
    """An `AttentionFn` over the sequence of all ranks of a group, with tensors that hold this rank's tokens."""

    def __init__(
        self,
        group: Group | None = None,
        inner: AttentionFn = sdpa,
        *,
        uneven_tokens: bool = False,
    ) -> None:
        """Constructs the function; nothing is sent before the first call.

        Args:
            group: the sequence-parallel ranks, in the order of their tokens. Default: all ranks.
            inner: the attention of some heads over all tokens.
            uneven_tokens: whether ranks may have different numbers of tokens; they are then exchanged in every call.
                Otherwise they are compared, on accelerators in the first call only.
        """
        self._exchange = HeadExchange(group, uneven_tokens=uneven_tokens)
        self._inner = inner

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent."""
        return self._exchange.traffic

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
    ) -> Tensor:
        """See `AttentionFn`."""
        return self._exchange(lambda *own: self._inner(*own, causal=causal, scale=scale), q, k, v)


class DistributedAttention(nn.Module):
    """Any attention module, over the sequence of all ranks of a group.

    Args:
        local_attention: called with queries, keys and values of some heads and all tokens, and with further arguments
            of `forward` as they are.
        group: the sequence-parallel ranks, in the order of their tokens.
        scatter_idx: dimension of the heads in the four-dimensional inputs.
        gather_idx: dimension of the tokens: 0 for (tokens, batch, heads, head_dim), 1 for (batch, tokens, heads,
            head_dim).

    Raises:
        ValueError: other dimensions, or `local_attention` is a `DistributedAttention` over the same ranks, which would
            divide a sequence twice.
    """

    def __init__(
        self,
        local_attention: Callable[..., Tensor],
        group: Group | None = None,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        *,
        uneven_tokens: bool = False,
    ) -> None:
        super().__init__()
        if scatter_idx != 2 or gather_idx not in (0, 1):
            raise ValueError(
                f"scatter_idx={scatter_idx}, gather_idx={gather_idx}: heads must be dimension 2, and tokens "
                "dimension 0 or 1"
            )
        self.local_attention = local_attention
        self.gather_idx = gather_idx
        self._exchange = HeadExchange(group, uneven_tokens=uneven_tokens)
        inner = getattr(local_attention, "_exchange", None)
        if isinstance(inner, HeadExchange) and _same_ranks(inner.group, self._exchange.group):
            raise ValueError(
                f"the local attention divides the sequence among the same {self._exchange.size} ranks already: "
                "a sequence is divided once"
            )

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent."""
        return self._exchange.traffic

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the attention of this rank's tokens to those of all ranks, in the layout of `query`."""

        def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = self.local_attention(*(self._swapped(x) for x in (q, k, v)), *args, **kwargs)
            return self._swapped(out)

        return self._swapped(self._exchange(local, *(self._swapped(x) for x in (query, key, value))))

    def _swapped(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if self.gather_idx == 0 else x


def process_group(group: Group | None) -> dist.ProcessGroup | None:
    """Returns the process group of a mesh of one axis, or of all ranks; None for a single rank.

    Raises:
        ValueError: the mesh has several axes, or this rank is not in the group.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"the mesh has {group.ndim} axes: pass one of them, such as mesh['sequence']")
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD if dist.is_initialized() else None
    if group is None:
        return None
    if not isinstance(group, dist.ProcessGroup):  # what torch returns to ranks outside of a new group
        raise ValueError("this rank is not in the group: every rank must pass the group that contains it")
    return group if group.size() > 1 else None


def _same_ranks(first: dist.ProcessGroup | None, second: dist.ProcessGroup | None) -> bool:
    if first is None or second is None:
        return False
    return bool(
        set(dist.get_process_group_ranks(first))
        & set(dist.get_process_group_ranks(second)) - {dist.get_rank()}
    )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: all must be (batch, tokens, heads, "
            "head_dim), with the same sizes except for the heads of q and the head_dim of v"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v have the dtypes {q.dtype}, {k.dtype} and {v.dtype}: cast them to one")
