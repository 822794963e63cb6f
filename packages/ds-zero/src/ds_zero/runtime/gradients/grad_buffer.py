"""Whole gradients of a bucket, side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_zero.layout.buckets import BucketLayout


class GradBuffer:
    """Whole gradients of one bucket; gaps between slots are zero, slots are undefined until first written."""

    def __init__(self, layout: BucketLayout, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.empty(layout.padded_numel, dtype=dtype, device=device)
        for begin, end in layout.gaps():
            self.tensor[begin:end].zero_()
        self._layout = layout
        self._filled: set[int] = set()

    def add(self, index: int, grad: Tensor) -> None:
        slot = self._layout.slots[index]
        view = self.tensor[slot.offset : slot.end].view(slot.shape)
        if grad.is_sparse:
            if index not in self._filled:
                view.zero_()
            view.add_(grad)  # only the rows that it has
        elif index in self._filled:
            view.add_(grad)
        else:
            view.copy_(grad)
        self._filled.add(index)

    def copy_to(self, whole: Tensor) -> None:
        """Copy what has been added so far; the rest of `whole` stays."""
        for index in self._filled:
            slot = self._layout.slots[index]
            whole[slot.offset : slot.end].copy_(self.tensor[slot.offset : slot.end])

    def zero_missing(self) -> None:
        for index, slot in enumerate(self._layout.slots):
            if index not in self._filled:
                self.tensor[slot.offset : slot.end].zero_()
