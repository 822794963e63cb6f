"""One bucket on one rank: its tensors and how parameters look into them.

[Note: tensors of a bucket]
full     compute dtype, padded_numel elements. Whole buckets (`unit` is None) keep it; stage-3 buckets give it
         memory while they are gathered.
low      compute dtype, this rank's owned range: a view of `full`, or a tensor of its own where `full` comes and
         goes.
master   fp32, owned range; the same tensor as `low` where parameters are fp32. None for frozen parameters.
grad     fp32, owned range: reduced gradients, of which the optimizer's entries see pieces. Reserved on first use.

[Note: one storage object]
A tensor saved for backward may be a view of a parameter, for example its transpose. So the gathered storage
is one object for the whole life of the bucket, resized between 0 and n: the view finds the values again once
they are gathered again. Meanwhile the parameter itself shows a stride-0 view of a single NaN, with its own
shape and dtype: reading it gives NaN, where reading through a storage of size 0 would end the process.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from ds_zero.comm.collectives import Comm
from ds_zero.comm.ranks import Ranks
from ds_zero.interfaces import Work
from ds_zero.layout.buckets import BucketLayout, Piece, piece_of
from ds_zero.runtime.gathering.secondary import Secondary
from ds_zero.tensors.large_pages import in_large_pages
from ds_zero.tensors.storage import is_fake


class BucketState(enum.Enum):
    """Who holds the values of a bucket's parameters."""

    WHOLE = "whole"
    """`full` is permanent; parameters are views of it; `low` is part of it."""
    SHARDED = "sharded"
    """Only `low` has values; `full`'s storage is empty; parameters show NaN."""
    GATHERING = "gathering"
    """`full` is allocated and messages are arriving; parameters still show NaN."""
    GATHERED = "gathered"
    """`full` has values and parameters are views of it; `low` stays the owner of this rank's part."""


class Bucket:
    """The tensors of one bucket, [Note: tensors of a bucket]; starts whole; `shard` decides what stays."""

    def __init__(
        self,
        layout: BucketLayout,
        ranks: Ranks,
        params: Sequence[nn.Parameter],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.ranks = ranks
        """Those that divide this bucket; experts have others than the rest of the model."""
        self.params = list(params)
        self.counted = [True] * len(self.params)
        """Whether a parameter's gradient counts in norms on this rank; else another rank counts it."""
        self.state = BucketState.WHOLE
        self.full = torch.zeros(layout.padded_numel, dtype=dtype, device=device)
        self.views = [self._view(i) for i in range(len(self.params))]
        self.holes = [
            torch.full((1,), float("nan"), dtype=dtype, device=device)
            if dtype.is_floating_point
            else self.full.new_zeros(1)
            for _ in self.params
        ]
        self.low: Tensor = self.full
        self.master: Tensor | None = None
        self.grad: Tensor | None = None
        self.secondary: Secondary | None = None
        """[Note: secondary shards]"""
        self.shards: list[Tensor] = []
        """Optimizer entries, one a slot, views of `master`; empty list for frozen parameters."""

    @property
    def whole(self) -> bool:
        return self.layout.unit is None

    @property
    def trainable(self) -> bool:
        return self.master is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.full.dtype

    @property
    def device(self) -> torch.device:
        return self.full.device

    def _view(self, index: int) -> Tensor:
        slot = self.layout.slots[index]
        return self.full[slot.offset : slot.end].view(slot.shape)

    @property
    def slice_range(self) -> tuple[int, int]:
        """What this rank reduces and sends, as a range of the bucket's elements."""
        return self.layout.slice_range(self.ranks.rank)

    @property
    def owned_range(self) -> tuple[int, int]:
        """What this rank holds masters and states of."""
        return self.layout.owned_range(self.ranks.rank)

    def slice_of(self, tensor: Tensor) -> Tensor:
        """This rank's slice of a tensor that has `padded_numel` elements."""
        begin, end = self.slice_range
        return tensor[begin:end]

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """What this rank owns of every slot; offsets count from the beginning of the owned range."""
        begin, end = self.owned_range
        return tuple(piece_of(slot, begin, end) for slot in self.layout.slots)

    def cut(self, tensor: Tensor) -> list[Tensor]:
        """The pieces of a tensor that has the owned range's elements, in the form of optimizer entries: whole
        tensors in their own shape where they are not divided, else flat.
        """
        found = []
        for slot, piece in zip(self.layout.slots, self.pieces, strict=True):
            part = tensor[piece.offset : piece.offset + piece.numel]
            found.append(part.view(slot.shape) if self.layout.undivided and piece.numel else part)
        return found

    # --- what parameters see

    def show_values(self) -> None:
        for param, view in zip(self.params, self.views, strict=True):
            param.data = view

    def show_holes(self) -> None:
        for param, hole, slot in zip(self.params, self.holes, self.layout.slots, strict=True):
            param.data = hole.expand(slot.shape)

    def inflate(self) -> None:
        """Give `full` its memory; the contents are undefined."""
        self.full.untyped_storage().resize_(self.layout.padded_numel * self.full.element_size())
        in_large_pages(self.full)

    def deflate(self) -> None:
        self.full.untyped_storage().resize_(0)

    def check_holes(self) -> None:
        """Raise if code wrote into a parameter while it was sharded; such a write has nowhere to go."""
        if self.device.type != "cpu" or not self.dtype.is_floating_point or is_fake(self.full):
            return  # reading a value back would stall the device, and a fake one has none
        for hole, slot in zip(self.holes, self.layout.slots, strict=True):
            if hole.item() == hole.item():
                hole.fill_(float("nan"))
                raise ValueError(
                    f"parameter {slot.fqn!r} was written while it is sharded; the write would be lost. "
                    "Write inside `with ds_zero.gathered([param], write=True):`"
                )

    # --- gathering

    def start_gather(self, comm: Comm, number: int) -> Work:
        """Ask for the values of `full`, from near if they are there."""
        near = self.secondary
        if near is not None and near.fresh:
            near.put(self.full)
            return comm.gather(self.full, near.ranks, sizes=near.sizes, number=number)
        self.slice_of(self.full).copy_(self.low)
        return comm.gather(self.full, self.ranks, sizes=self.layout.slice_sizes, number=number)

    def gathered(self) -> None:
        """The values have come."""
        if self.secondary is not None and not self.secondary.fresh:
            self.secondary.keep(self.full)

    def changed(self) -> None:
        """`low` has new values: copies of it are stale."""
        if self.secondary is not None:
            self.secondary.fresh = False

    # --- values

    def refresh_low(self) -> None:
        """Cast the masters into the compute-dtype shard."""
        self.changed()
        if self.master is not None and self.master is not self.low:
            self.low.copy_(self.master)
