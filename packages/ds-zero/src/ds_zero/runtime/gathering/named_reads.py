"""Parameters that code takes out of their modules by name during a forward, [Note: read outside]."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_zero.runtime.gathering.unit_gathering import UnitGathering
from ds_zero.runtime.gathering.watched_forwards import WatchedForwards


class NamedReads:
    """A `Listener` of modules' parameter dictionaries: gathers what is taken out while a forward runs."""

    def __init__(self, gathering: UnitGathering, watched: WatchedForwards) -> None:
        self._gathering, self._watched = gathering, watched
        self._holes = {h.untyped_storage()._cdata for b in gathering.buckets for h in b.holes}
        self.telling = False

    def taken(self, param: Tensor) -> None:
        """Code took `param` out of its module."""
        bucket = self._gathering.bucket_of(param)
        if bucket is None or self._gathering.is_held(bucket):
            return
        if self._watched.active:
            self._watched.taken(param)  # whoever reads it is seen there
        elif not self._watched.is_only_described(param):
            self._gathering.hold_for_forward(bucket)

    def replaced(self, name: str, value: object) -> None:
        """Code put another tensor in a parameter's place, as `torch.func.functional_call` does."""
        if not isinstance(value, Tensor) or self._gathering.bucket_of(value) is not None:
            return
        while torch._C._functorch.is_functorch_wrapped_tensor(value):
            value = torch._C._functorch.get_unwrapped(value)
        if value.layout is torch.strided and value.untyped_storage()._cdata in self._holes:
            raise ValueError(
                f"the tensor given for {name!r} was taken from a parameter while that was sharded, so it holds NaN: "
                "take it, and use it, inside `with ds_zero.gathered(model.parameters()):`"
            )
