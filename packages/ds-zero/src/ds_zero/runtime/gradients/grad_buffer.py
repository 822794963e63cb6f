"""Two forms of the gradients of one bucket before they are reduced: one flat buffer, or separate tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_zero.layout.buckets import BucketLayout


class GradBuffer:
    """The gradients of one bucket in a flat buffer. Gaps between slots are zero; a slot is undefined until its gradient
    is added.
    """

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
            view.add_(grad)  # changes only the rows that the sparse gradient contains
        elif index in self._filled:
            view.add_(grad)
        else:
            view.copy_(grad)
        self._filled.add(index)

    def add_to(self, other: GradBuffer) -> None:
        """Adds the gradients to `other`, a buffer of the same bucket."""
        for index in self._filled:
            slot = self._layout.slots[index]
            other.add(index, self.tensor[slot.offset : slot.end].view(slot.shape))

    def zero_missing(self) -> None:
        for index, slot in enumerate(self._layout.slots):
            if index not in self._filled:
                self.tensor[slot.offset : slot.end].zero_()


class FreshGrads:
    """The gradients of one bucket and one micro-batch, in the memory in which autograd stored them."""

    def __init__(self, layout: BucketLayout, dtype: torch.dtype, device: torch.device) -> None:
        self._layout, self._dtype, self._device = layout, dtype, device
        self._grads: dict[int, Tensor] = {}

    def add(self, index: int, grad: Tensor) -> None:
        held = self._grads.get(index)
        if held is None:
            self._grads[index] = grad.to(self._dtype).reshape(-1)
        else:
            held.add_(grad.reshape(-1))

    def add_to(self, other: GradBuffer) -> None:
        """Adds the gradients to `other`, a buffer of the same bucket."""
        for index, grad in self._grads.items():
            other.add(index, grad.view(self._layout.slots[index].shape))

    def take(self) -> list[Tensor]:
        """Removes and returns the gradients: one 1-D tensor per slot, zeros for parameters without a gradient."""
        grads, self._grads = self._grads, {}
        return [
            grads[i] if i in grads else torch.zeros(slot.numel, dtype=self._dtype, device=self._device)
            for i, slot in enumerate(self._layout.slots)
        ]
