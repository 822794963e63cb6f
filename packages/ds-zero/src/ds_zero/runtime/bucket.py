"""One bucket on one rank: the memory of its whole parameters, and the parameters' views of it.

The tensors that a rank keeps between steps (its ranges of parameters, masters and gradients) belong to
`storage.BucketStorage`, [Note: tensors of a bucket].

[Note: one storage object]
A tensor that autograd saves for backward may be a view of a parameter, for example its transpose. Such a view refers to
the storage of `Bucket.full`. So this storage stays the same object for the life of the bucket: it is resized to 0 when
the bucket is dropped, and to its full size when it is gathered again, after which the view has its values again.
While the bucket is dropped, `param.data` is a stride-0 view of a single NaN, with the parameter's shape and dtype. So
reading the parameter gives NaN, whereas reading from a storage of size 0 would crash the process.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ds_zero.comm.collectives import Comm
from ds_zero.comm.ranks import Ranks
from ds_zero.interfaces import Work
from ds_zero.layout.buckets import FROZEN, BucketLayout
from ds_zero.runtime.gathering.secondary import Secondary
from ds_zero.runtime.storage import PARAM, BucketStorage
from ds_zero.tensors.large_pages import in_large_pages
from ds_zero.tensors.storage import is_fake


class BucketState(enum.Enum):
    """Where the values of a bucket's parameters are."""

    WHOLE = "whole"
    """In `full`, which is never freed. Parameters are views of it."""
    SHARDED = "sharded"
    """Only in `BucketStorage`, as this rank's part. `full` has no memory; parameters read as NaN."""
    GATHERING = "gathering"
    """As SHARDED, but `full` is allocated and is being filled."""
    GATHERED = "gathered"
    """In `full`; parameters are views of it. `BucketStorage` still owns this rank's part."""


def whole_memory(layout: BucketLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns zeros for all elements of a bucket, including the gaps between slots."""
    return torch.zeros(layout.padded_numel, dtype=dtype, device=device)


class Bucket:
    """The parameters of one bucket, and `full`, of which they are views while they are whole."""

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
            full: (padded_numel,), all values in the compute dtype. If the bucket is sharded (stage 3), its memory is
                freed by the constructor.
        """
        self.layout = layout = storage.layout
        self.ranks = ranks
        """The ranks that this bucket is sharded over; for experts they differ from those of the rest of the model."""
        self.params = list(params)
        self.counted = list(counted)
        """For each parameter, whether this rank adds its gradient to norms; otherwise another rank does."""
        self.storage = storage
        self.shards = storage.shards
        """Optimizer entries, one per slot; empty for frozen parameters."""
        self.full = full
        """(padded_numel,), in the compute dtype."""
        self.views = [self._view(i) for i in range(len(self.params))]
        self.placeholders = [
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
        """The range of the bucket's elements that this rank reduces and sends to others."""
        return self.layout.slice_range(self.ranks.rank)

    @property
    def owned_range(self) -> tuple[int, int]:
        """The range of the bucket's elements of which this rank holds masters and optimizer states."""
        return self.layout.owned_range(self.ranks.rank)

    def slice_of(self, tensor: Tensor) -> Tensor:
        """Returns this rank's slice of a tensor that has `padded_numel` elements."""
        begin, end = self.slice_range
        return tensor[begin:end]

    # --- the data of parameters

    def _show_values(self) -> None:
        for param, view in zip(self.params, self.views, strict=True):
            param.data = view

    def drop(self) -> None:
        """Frees the memory of `full`. Parameters read as NaN afterwards."""
        for param, placeholder, slot in zip(self.params, self.placeholders, self.layout.slots, strict=True):
            param.data = placeholder.expand(slot.shape)
        self.full.untyped_storage().resize_(0)
        self.state = BucketState.SHARDED

    def release_params(self) -> None:
        """Copies every parameter to memory of its own. The bucket must not be used afterwards."""
        for param, view in zip(self.params, self.views, strict=True):
            param.data = view.clone()
        self.state = BucketState.WHOLE

    def check_placeholders(self) -> None:
        """Raises if code wrote to a parameter while it was sharded, because that value would be lost."""
        if self.device.type != "cpu" or not self.dtype.is_floating_point or is_fake(self.full):
            return  # reading a value would synchronise the device, and a fake tensor has none
        for placeholder, slot in zip(self.placeholders, self.layout.slots, strict=True):
            if placeholder.item() == placeholder.item():  # NaN, which it should be, is not equal to itself
                placeholder.fill_(float("nan"))
                raise ValueError(
                    f"parameter {slot.fqn!r} was written while it is sharded; the write would be lost. "
                    "Write inside `with ds_zero.gathered([param], write=True):`"
                )

    # --- gathering

    def begin_gather(self) -> Work | None:
        """Allocates the memory of `full`, and starts to copy this rank's part into it.

        Returns:
            The copy, for which the caller must wait before `start_gather`; None if it is finished.
        """
        self.check_placeholders()
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
        """Starts the all-gather of `full`, within the secondary group if its copy is valid."""
        near = self.secondary
        if near is not None and near.fresh:
            return comm.gather(self.full, near.ranks, sizes=near.sizes, number=number)
        sizes, frozen = self.layout.slice_sizes, self.layout.group == FROZEN
        return comm.gather(self.full, self.ranks, sizes=sizes, number=number, frozen=frozen)

    def end_gather(self) -> None:
        """Makes the parameters views of `full`, after the all-gather."""
        if self.secondary is not None and not self.secondary.fresh:
            self.secondary.keep(self.full)
        self._show_values()
        self.state = BucketState.GATHERED

    def drop_secondary(self) -> None:
        """Gathers from all ranks from now on."""
        self.secondary = None

    def changed(self) -> None:
        """Marks the secondary copy as stale, because the stored parameters have changed."""
        if self.secondary is not None:
            self.secondary.make_stale()

    def refresh_params(self) -> None:
        """Casts the masters to the compute dtype and writes them to the stored parameters."""
        self.changed()
        self.storage.refresh_param()
