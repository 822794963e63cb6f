"""Parameters that code reads from their modules by name during a forward, [Note: external parameters]."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_zero.runtime.gathering.unit_gathering import UnitGathering
from ds_zero.runtime.gathering.watched_forwards import WatchedForwards


class NamedReads:
    """A `Listener` of modules' parameter dictionaries, which gathers parameters that are read during a forward."""

    def __init__(self, gathering: UnitGathering, watched: WatchedForwards) -> None:
        self._gathering, self._watched = gathering, watched
        self._placeholders = {p.untyped_storage()._cdata for b in gathering.buckets for p in b.placeholders}
        self.listening = False

    def on_read(self, param: Tensor) -> None:
        """Called when code has read `param` from its module."""
        bucket = self._gathering.bucket_of(param)
        if bucket is None or self._gathering.is_held(bucket):
            return
        if self._watched.active:
            self._watched.note_named(param)  # an operation that reads its values will be intercepted
        elif not self._watched.reads_only_metadata(param):
            self._gathering.hold_for_forward(bucket)

    def on_replaced(self, name: str, value: object) -> None:
        """Called when code replaces a parameter by another tensor, as `torch.func.functional_call` does."""
        if not isinstance(value, Tensor) or self._gathering.bucket_of(value) is not None:
            return
        while torch._C._functorch.is_functorch_wrapped_tensor(value):
            value = torch._C._functorch.get_unwrapped(value)
        if value.layout is torch.strided and value.untyped_storage()._cdata in self._placeholders:
            raise ValueError(
                f"the tensor given for {name!r} was taken from a parameter while that was sharded, so it contains NaN: "
                "take and use it inside `with ds_zero.gathered(model.parameters()):`"
            )
