"""Tensors saved for backward that look into gathered memory.

[Note: hidden outputs]
A module's backward is noticed by the gradients of its outputs. What it leaves elsewhere (an auxiliary loss kept
as an attribute, a tensor put into a list) has a backward that nobody announces. So the first forward that is
watched packs what it saves: a tensor that looks into a bucket's `full` is unpacked only after the bucket has
been gathered, whoever asks. Calls that use a bucket which was once asked for while nobody held it go on packing.
Other calls save as always: packing costs some microseconds a tensor, and takes torch's check for tensors that
were changed in place after they were saved.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.gathering.unit_gathering import UnitGathering
from ds_zero.runtime.gradients.backward import BackwardWatch, in_backward
from ds_zero.runtime.uncompiled import opaque


class SavedParameters:
    """Packs saved tensors, and gathers the bucket of every parameter that is unpacked."""

    def __init__(self, gathering: UnitGathering, watch: BackwardWatch) -> None:
        self._bucket_of = {b.full.untyped_storage()._cdata: b for b in gathering.buckets}
        # Packed tensors keep this object alive as long as their graph, and must not keep the model's state.
        self._gathering, self._watch = weakref.ref(gathering), weakref.ref(watch)

    def bucket_of(self, tensor: Tensor) -> Bucket | None:
        """The bucket into whose memory `tensor` looks."""
        return (
            self._bucket_of.get(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None
        )

    def packing(self) -> AbstractContextManager[None] | None:
        """A context that packs; None inside of other hooks on saved tensors (activation checkpointing,
        offloading), which see to it themselves that values are there.
        """
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return None
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

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
