"""Sequence parallelism for models of Transformers, through its registry of attention functions."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_layers.attention.local import sdpa
from ds_layers.interfaces import AttentionFn
from ds_layers.sequence.exchange import has_values
from ds_layers.sequence.layout import SequenceLayout
from ds_layers.sequence.ring import RingAttention
from ds_layers.sequence.ulysses import Group, HeadExchange, process_group


@dataclass(frozen=True)
class _Tokens:
    """What the ranks know together about the tokens of a forward pass."""

    mask: Tensor | None
    """(batch, 1, tokens, tokens), True where a token may attend; None: only causality matters."""


class SequenceParallelAttention:
    """An attention function of Transformers over the sequence of all ranks of a group.

    Batches come from `SequenceBatches`. Padding, packed sequences (positions that start again at 0) and sliding windows
    are respected.
    """

    def __init__(
        self,
        group: Group | None = None,
        *,
        layout: SequenceLayout | None = None,
        disable_in_eval: bool = False,
    ) -> None:
        """Constructs the function.

        Args:
            group: the sequence-parallel ranks. Default: all ranks.
            layout: how tokens are divided. With a ring, a new process group is created for each place of it, so all
                ranks must construct the function together.
            disable_in_eval: in evaluation mode, sequences are whole on every rank.

        Raises:
            ValueError: a layout for another number of ranks.
        """
        self._group = process_group(group)
        size = self._group.size() if self._group is not None else 1
        self.layout = layout or SequenceLayout(size=size)
        if self.layout.size != size:
            raise ValueError(f"the layout is for {self.layout.size} ranks, and the group has {size}")
        within, around = groups_of(self._group, self.layout)
        self._exchange = HeadExchange(within) if self.layout.ring < size else None
        self._ring: AttentionFn | None = (
            RingAttention(around, order=self.layout.order) if self.layout.ring > 1 else None
        )
        self._disable_in_eval = disable_in_eval
        self._known: tuple[weakref.ref[Tensor], weakref.ref[Tensor] | None, int, bool, _Tokens] | None = None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        """Returns (batch, tokens, heads, head_dim), with tensors as Transformers passes them.

        Args:
            query, key, value: (batch, heads, tokens, head_dim).
            attention_mask: (batch, tokens), of this rank's tokens.

        Raises:
            ValueError: cross attention, a cache of keys, a mask or a window with ring attention, or a sequence that was
                not divided.
        """
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
        if self._group is None or (self._disable_in_eval and not module.training):
            mask = _own_mask(attention_mask, q, k, causal, more.get("sliding_window"))
            return sdpa(q, k, v, causal=causal, scale=scaling, mask=mask, dropout=dropout), None
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"{q.shape[1]} queries and {k.shape[1]} keys: sequence parallelism supports neither cross attention "
                "nor a cache of keys; call the model with use_cache=False"
            )
        tokens = self._tokens(q, more.get("position_ids"), attention_mask, causal, more.get("sliding_window"))

        def inner(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self._ring is not None:
                return self._ring(q, k, v, causal=causal, scale=scaling)
            return sdpa(q, k, v, causal=causal, scale=scaling, mask=tokens.mask, dropout=dropout)

        if self._ring is not None and (tokens.mask is not None or dropout):
            raise ValueError(
                "ring attention supports neither padding on the left, packed sequences, sliding windows nor dropout: "
                "use a layout without a ring"
            )
        out = inner(q, k, v) if self._exchange is None else self._exchange(inner, q, k, v)
        return out.contiguous(), None

    def _tokens(
        self, q: Tensor, positions: Tensor | None, keep: Tensor | None, causal: bool, window: int | None
    ) -> _Tokens:
        """Returns the mask of a forward pass. Collective in its first layer; the others find it here."""
        size = window or 0
        if positions is None and keep is None and not size:
            return _Tokens(None)
        if positions is None:
            raise ValueError(
                f"{'attention_mask' if keep is not None else 'sliding_window'} needs position_ids, which the model "
                "does not pass to its attention: remove it, or use another model"
            )
        if self._known is not None:
            own, own_keep, own_size, own_causal, tokens = self._known
            same_mask = keep is None if own_keep is None else own_keep() is keep
            if own() is positions and same_mask and own_size == size and own_causal == causal:
                return tokens
        tokens = _Tokens(self._mask(q, positions, keep, causal, size))
        reference = None if keep is None else weakref.ref(keep)
        self._known = (weakref.ref(positions), reference, size, causal, tokens)
        return tokens

    def _mask(
        self, q: Tensor, positions: Tensor, keep: Tensor | None, causal: bool, window: int
    ) -> Tensor | None:
        assert self._group is not None
        positions = positions.expand(q.shape[0], -1)
        real = torch.ones_like(positions) if keep is None else keep.to(positions.dtype)
        gathered = [torch.empty_like(torch.stack([positions, real])) for _ in range(self.layout.size)]
        dist.all_gather(gathered, torch.stack([positions, real]).contiguous(), group=self._group)
        if not has_values(positions):  # planned as sequences without padding
            return None
        if all(torch.equal(part[0], gathered[0][0]) for part in gathered):
            raise ValueError(
                f"all {self.layout.size} sequence-parallel ranks have the positions {int(positions.min())} to "
                f"{int(positions.max())}: the sequence was not divided. Load batches through SequenceBatches"
            )
        where, kept = _in_order(gathered, self.layout)
        # Positions that start again begin another sequence.
        documents = (where.diff(dim=1, prepend=where[:, :1]) != 1).cumsum(1)
        documents = documents - documents[:, :1]
        # Padding at the end is attended to by padding only, if attention is causal.
        at_end = bool((kept.diff(dim=1) <= 0).all())
        packed, limited = bool(documents.any()), 0 < window < where.shape[1]
        if not packed and not limited and (bool(kept.all()) or (causal and at_end)):
            return None
        return _allowed(documents, kept, causal, window)


def _in_order(gathered: list[Tensor], layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    """Returns positions and mask of the whole sequence, (batch, tokens), in its order."""
    total = gathered[0].shape[-1] * layout.size
    whole = torch.empty((*gathered[0].shape[:-1], total), dtype=gathered[0].dtype, device=gathered[0].device)
    for rank, part in enumerate(gathered):
        begin = 0
        for low, high in layout.ranges(rank, total):
            whole[..., low:high] = part[..., begin : begin + high - low]
            begin += high - low
    return whole[0], whole[1]


def _allowed(documents: Tensor, kept: Tensor, causal: bool, window: int) -> Tensor:
    index = torch.arange(documents.shape[1], device=documents.device)
    distance = index[:, None] - index
    allowed = (documents[:, :, None] == documents[:, None, :]) & kept.bool()[:, None, :]
    if causal:
        allowed &= distance >= 0
    if window:
        allowed &= distance.abs() < window
    allowed |= distance == 0  # a row without keys would not be a number
    return allowed.unsqueeze(1)


def _own_mask(keep: Tensor | None, q: Tensor, k: Tensor, causal: bool, window: int | None) -> Tensor | None:
    """The mask of a sequence that is whole on this rank; the queries are its last tokens."""
    if keep is not None and keep.ndim == 4:
        return keep
    queries, keys = q.shape[1], k.shape[1]
    if (keep is None or bool(keep.all())) and not window and (queries == keys or not causal):
        return None
    kept = torch.ones((q.shape[0], keys), device=q.device) if keep is None else keep
    return _allowed(torch.zeros_like(kept), kept, causal, window or 0)[:, :, keys - queries :]


def groups_of(
    group: dist.ProcessGroup | None, layout: SequenceLayout
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Returns the group within this rank's place of the ring, for Ulysses, and the ring of this rank. Collective over
    the default process group if there is a ring within a larger group.
    """
    if layout.ring == 1 or group is None:
        return group, None
    if layout.ring == layout.size:
        return None, group
    # Every rank of the job takes part in the creation of every group, so all must know all groups.
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dist.get_process_group_ranks(group))
    return _made_groups(everyone, layout.size // layout.ring)


def _made_groups(
    everyone: list[list[int]], within_size: int
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    within: dist.ProcessGroup | None = None
    around: dist.ProcessGroup | None = None
    me = dist.get_rank()
    for ranks in sorted({tuple(ranks) for ranks in everyone}):
        places = [ranks[i : i + within_size] for i in range(0, len(ranks), within_size)]
        for members in places:
            made = dist.new_group(list(members))
            within = made if me in members else within
        for members in zip(*places, strict=True):
            made = dist.new_group(list(members))
            around = made if me in members else around
    return within, around


def register_with_transformers(
    attention: Callable[..., Any], *, model: nn.Module | None = None, name: str | None = None
) -> str:
    """Registers an attention function with Transformers, and returns its name, for `attn_implementation=`.

    Args:
        attention: such as a `SequenceParallelAttention`.
        model: a model of Transformers that uses the function from now on.
        name: the name. Default: one that no other function has.

    Raises:
        ImportError: Transformers is not installed.
        ValueError: the model has no `config`.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    chosen = name or f"ds_sequence_parallel_{id(attention)}"
    AttentionInterface.register(chosen, attention)
    AttentionMaskInterface.register(chosen, _mask_as_given)
    if model is not None:
        if not hasattr(model, "config"):
            raise ValueError(f"{type(model).__name__} has no config: it is not a model of Transformers")
        model.set_attn_implementation(chosen)  # type: ignore[operator]
    return chosen


def _mask_as_given(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """A mask function of Transformers that returns the mask of padding as it is."""
    return attention_mask
