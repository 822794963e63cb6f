"""Tensors saved for backward that are views of gathered parameters.

[Note: unreported backwards]
The start of a module's backward is detected by hooks on the gradients of its outputs. If a module stores a tensor
elsewhere (an auxiliary loss as an attribute, a tensor in a list), the backward of that tensor is not reported by any
hook. Therefore the first watched forward uses `saved_tensors_hooks`: when autograd unpacks a saved tensor that is a
view of a bucket's `full`, the bucket is gathered first. If this happens for a bucket that no call had gathered, later
calls that use the bucket keep using these hooks. Other calls do not, because the hooks take some microseconds per
tensor and disable torch's check for saved tensors that were changed in place.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.gathering.unit_gathering import UnitGathering
from ds_zero.runtime.gradients.backward import BackwardWatch, in_backward
from ds_zero.runtime.uncompiled import opaque


@dataclass(frozen=True, slots=True)
class _Others:
    """What the hooks of others keep in place of a tensor."""

    held: Any


class SavedParameters:
    """Hooks on saved tensors that gather the bucket of a parameter when it is unpacked."""

    def __init__(self, gathering: UnitGathering, watch: BackwardWatch) -> None:
        self._bucket_of = {b.full.untyped_storage()._cdata: b for b in gathering.buckets}
        # Weak references, since autograd graphs keep this object alive, and must not keep the model's state alive.
        self._gathering, self._watch = weakref.ref(gathering), weakref.ref(watch)

    def bucket_of(self, tensor: Tensor) -> Bucket | None:
        """Returns the bucket of which `tensor` is a view, or None."""
        return (
            self._bucket_of.get(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None
        )

    def packing(self) -> AbstractContextManager[None] | None:
        """Returns a context manager that enables the hooks; None if others are active which provide the values
        themselves (those of activation checkpointing). Hooks that keep parameters as they are, and say so by an
        attribute `keeps_parameters` of their first function, still get all other tensors.
        """
        others: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if others is None:
            return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        pack, unpack = others
        if not getattr(pack, "keeps_parameters", False):
            return None
        return torch.autograd.graph.saved_tensors_hooks(
            opaque(lambda t: self._pack(t) if self.bucket_of(t) is not None else _Others(pack(t))),
            opaque(
                lambda packed: unpack(packed.held) if isinstance(packed, _Others) else self._unpack(packed)
            ),
        )

    @opaque
    def _pack(self, tensor: Tensor) -> Tensor | tuple[Bucket, Tensor]:
        bucket = self.bucket_of(tensor)
        return tensor if bucket is None else (bucket, tensor)

    @opaque
    def _unpack(self, packed: Tensor | tuple[Bucket, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        bucket, tensor = packed
        gathering, watch = self._gathering(), self._watch()
        if gathering is not None and gathering.hold_for_backward(bucket):
            if watch is not None and in_backward():
                watch.arm()
        return tensor
