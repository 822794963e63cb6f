"""The first forward in each mode, watched operation by operation, [Note: read outside]."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ds_zero.runtime.gathering.external_params import OutsideOperands, OutsideReads
from ds_zero.runtime.gathering.unit_gathering import UnitGathering


class WatchedForwards:
    """Gathers parameters that are read outside of their modules in a watched forward, and has the model itself hold
    them in later ones.
    """

    def __init__(self, gathering: UnitGathering) -> None:
        self._gathering = gathering
        self._done: set[tuple[bool, bool]] = set()
        """(training, gradients wanted) of the forwards that were watched."""
        self._taken: set[int] | None = None
        """While a forward is watched: parameters that were taken out of their modules and not read so far."""
        self._only_described: set[int] = set()

    @property
    def active(self) -> bool:
        """Whether a forward is watched now."""
        return self._taken is not None

    def is_due(self, *, training: bool) -> bool:
        """Whether the model's forward that begins now is the first one in its mode."""
        return (training, torch.is_grad_enabled()) not in self._done

    def begin(self) -> AbstractContextManager[Any]:
        """The context in which the forward runs; `end` follows it."""
        self._taken = set()
        return OutsideReads(self._read) if torch.is_grad_enabled() else OutsideOperands(self._read)

    def end(self, *, training: bool) -> None:
        """The watched forward has come to its end."""
        if self._taken is not None:
            self._done.add((training, torch.is_grad_enabled()))
            self._only_described |= self._taken
            self._taken = None

    def taken(self, param: Tensor) -> None:
        """Code took `param` out of its module while a forward is watched."""
        if self._taken is not None:
            self._taken.add(id(param))

    def is_only_described(self, param: Tensor) -> bool:
        """Whether a watched forward took the shape, dtype or device of `param` and never its elements."""
        return id(param) in self._only_described

    def _read(self, param: nn.Parameter) -> None:
        """A torch function takes elements of `param`."""
        bucket = self._gathering.bucket_of(param)
        if bucket is None or self._gathering.is_held(bucket):
            return
        if self._taken is not None:
            self._taken.discard(id(param))
        self._only_described.discard(id(param))
        self._gathering.hold_for_forward(bucket)
        self._gathering.hold_in_root(bucket)
