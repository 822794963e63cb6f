"""The current location of a parameter's values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ds_zero import _registry
from ds_zero.layout.buckets import FROZEN
from ds_zero.runtime.bucket import BucketState
from ds_zero.runtime.storage import PARAM


@dataclass(frozen=True, kw_only=True)
class Presence:
    """The status of a parameter on this rank, as returned by `presence`."""

    divided: bool
    """Whether ranks hold slices of it (stage 3); otherwise every rank holds all of it."""
    kept: bool
    """Whether stage 3 keeps it whole on every rank because it is small."""
    here: bool
    """Whether its values can be read now."""
    trained: bool
    """Whether it is in a group of the optimizer; False before `shard`."""
    own: Tensor | None
    """This rank's slice in the dtype of the parameter, 1-D; None for a parameter of `deferred_init` before `shard`, and
    where the store keeps the slice away."""


def presence(param: nn.Parameter) -> Presence | None:
    """Returns the status of a parameter; None if it is neither sharded nor constructed under `deferred_init` or
    `divided_init`.
    """
    record = _registry.find_record(param)
    if record is not None:
        return Presence(
            divided=True, kept=False, here=not record.hides(param), trained=False, own=record.own(param)
        )
    state = _registry.find(param)
    if state is None:
        return None
    bucket, index = state.bucket_of(param)
    slot, owned = bucket.layout.slots[index], bucket.storage.addressable(PARAM)
    first, _ = bucket.owned_range
    begin, end = bucket.slice_range
    low = min(max(slot.offset, begin), slot.end) - first
    high = max(min(slot.end, end) - first, low)
    return Presence(
        divided=not bucket.whole,
        kept=bucket.whole and state.stage == 3,
        here=bucket.state in (BucketState.WHOLE, BucketState.GATHERED),
        trained=bucket.layout.group != FROZEN,
        own=owned.detach()[low:high] if owned is not None else None,
    )
