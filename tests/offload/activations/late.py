"""Copies that are late: what they read must stay as it is until they are done, and their target has no value before."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_offload.activations.copies import Copy


class LateCopy:
    """Copies when it is waited for, or when it is asked for the third time whether it is done."""

    def __init__(self, owner: LateCopies, src: Tensor, dst: Tensor) -> None:
        self._owner, self._src, self._dst = owner, src, dst
        self._asked = 0
        dst.fill_(0xFF)  # NaN in every format

    def done(self) -> bool:
        self._asked += 1
        if self._asked >= 3:
            self._copy()
        return self._owner.finished(self)

    def wait(self) -> None:
        self._copy()

    def order(self) -> None:
        self._copy()

    def _copy(self) -> None:
        # As on one stream: those that were started before come first.
        while not self._owner.finished(self):
            first = self._owner.open.pop(0)
            first._dst.copy_(first._src)
            first._src = first._dst = torch.empty(0)


class LateCopies:
    """Makes late copies, in the order in which they were started."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.open: list[LateCopy] = []

    def start(self, src: Tensor, dst: Tensor) -> Copy:
        assert src.dtype == dst.dtype == torch.uint8 and src.shape == dst.shape
        copy = LateCopy(self, src, dst)
        self.open.append(copy)
        return copy

    def finished(self, copy: LateCopy) -> bool:
        return copy not in self.open
