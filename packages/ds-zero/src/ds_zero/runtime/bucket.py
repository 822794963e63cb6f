"""One bucket on one rank: the memory in which its parameters are whole, and how they look into it.

What rests between steps (this rank's range of parameters, masters and gradients) belongs to `storage.BucketStorage`,
[Note: kinds of a bucket].

[Note: one storage object]
A tensor saved for backward may be a view of a parameter, for example its transpose. So the gathered storage
is one object for the whole life of the bucket, resized between 0 and n: the view finds the values again once
they are gathered again. Meanwhile the parameter itself shows a stride-0 view of a single NaN, with its own
shape and dtype: reading it gives NaN, where reading through a storage of size 0 would end the process.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ds_zero.comm.collectives import Comm
from ds_zero.comm.ranks import Ranks
from ds_zero.interfaces import Work
from ds_zero.layout.buckets import BucketLayout
from ds_zero.runtime.gathering.secondary import Secondary
from ds_zero.runtime.storage import PARAM, BucketStorage
from ds_zero.tensors.large_pages import in_large_pages
from ds_zero.tensors.storage import is_fake


class BucketState(enum.Enum):
    """Who holds the values of a bucket's parameters."""

    WHOLE = "whole"
    """`full` is permanent; parameters are views of it."""
    SHARDED = "sharded"
    """Only the storage has values; `full`'s memory is empty; parameters show NaN."""
    GATHERING = "gathering"
    """`full` is allocated and messages are arriving; parameters still show NaN."""
    GATHERED = "gathered"
    """`full` has values and parameters are views of it; the storage stays the owner of this rank's part."""


def whole_memory(layout: BucketLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros for all elements of a bucket, the gaps between slots included."""
    return torch.zeros(layout.padded_numel, dtype=dtype, device=device)


class Bucket:
    """The parameters of one bucket, and `full`, into which they look while they are whole."""

    def __init__(
        self,
        ranks: Ranks,
        params: Sequence[nn.Parameter],
        full: Tensor,
        storage: BucketStorage,
        *,
        counted: Sequence[bool],
        secondary: Secondary | None,
    ) -> None:
        """
        Args:
            full: all values in compute dtype. In stage 3 its memory is given back at once.
        """
        self.layout = layout = storage.layout
        self.ranks = ranks
        """Those that divide this bucket; experts have others than the rest of the model."""
        self.params = list(params)
        self.counted = list(counted)
        """Whether a parameter's gradient counts in norms on this rank; else another rank counts it."""
        self.storage = storage
        self.shards = storage.shards
        """Optimizer entries, one a slot; none for frozen parameters."""
        self.full = full
        """`padded_numel` elements in compute dtype."""
        self.views = [self._view(i) for i in range(len(self.params))]
        self.holes = [
            torch.full((1,), float("nan"), dtype=full.dtype, device=full.device)
            if full.dtype.is_floating_point
            else full.new_zeros(1)
            for _ in self.params
        ]
        self.secondary = secondary
        """[Note: secondary shards]"""
        self.state = BucketState.WHOLE
        if layout.unit is None:
            self._show_values()
        else:
            self.drop()

    @property
    def whole(self) -> bool:
        return self.layout.unit is None

    @property
    def trainable(self) -> bool:
        return bool(self.shards)

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

    # --- what parameters see

    def _show_values(self) -> None:
        for param, view in zip(self.params, self.views, strict=True):
            param.data = view

    def drop(self) -> None:
        """Give the memory of `full` back; parameters show NaN."""
        for param, hole, slot in zip(self.params, self.holes, self.layout.slots, strict=True):
            param.data = hole.expand(slot.shape)
        self.full.untyped_storage().resize_(0)
        self.state = BucketState.SHARDED

    def release_params(self) -> None:
        """Give every parameter memory of its own, with its values. The bucket is not used afterwards."""
        for param, view in zip(self.params, self.views, strict=True):
            param.data = view.clone()
        self.state = BucketState.WHOLE

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

    def begin_gather(self) -> Work | None:
        """Give `full` its memory, and begin to put this rank's part into it.

        Returns:
            What `start_gather` has to wait for; None if the part is there.
        """
        self.check_holes()
        self.full.untyped_storage().resize_(self.layout.padded_numel * self.full.element_size())
        in_large_pages(self.full)
        self.state = BucketState.GATHERING
        near = self.secondary
        if near is not None and near.fresh:
            near.put(self.full)
            return None
        try:
            loading = self.storage.read_param(self.slice_of(self.full))
        except BaseException:
            self.drop()
            raise
        return loading if self.storage.is_away(PARAM) else None

    def start_gather(self, comm: Comm, number: int) -> Work:
        """Ask for the other ranks' parts of `full`, from near if they are there."""
        near = self.secondary
        if near is not None and near.fresh:
            return comm.gather(self.full, near.ranks, sizes=near.sizes, number=number)
        return comm.gather(self.full, self.ranks, sizes=self.layout.slice_sizes, number=number)

    def end_gather(self) -> None:
        """The values have come: parameters show them."""
        if self.secondary is not None and not self.secondary.fresh:
            self.secondary.keep(self.full)
        self._show_values()
        self.state = BucketState.GATHERED

    def drop_secondary(self) -> None:
        """Gather from all ranks from now on."""
        self.secondary = None

    def changed(self) -> None:
        """The parameters at rest have new values: copies of them are stale."""
        if self.secondary is not None:
            self.secondary.make_stale()

    def refresh_params(self) -> None:
        """Cast the masters into the parameters at rest."""
        self.changed()
        self.storage.refresh_param()
