"""The first forward in each mode, of which all operations are intercepted, [Note: external parameters]."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ds_zero.runtime.gathering.external_params import ExternalOperands, ExternalReads
from ds_zero.runtime.gathering.unit_gathering import UnitGathering


class WatchedForwards:
    """Gathers external parameters in a watched forward, and makes the model gather them in later ones."""

    def __init__(self, gathering: UnitGathering) -> None:
        self._gathering = gathering
        self._done: set[tuple[bool, bool]] = set()
        """(training, gradients enabled) of the forwards that were watched."""
        self._named: set[int] | None = None
        """While a forward is watched: `id` of the parameters that were read by name and whose values no operation has
        read so far. Otherwise None."""
        self._metadata_only: set[int] = set()

    @property
    def active(self) -> bool:
        """Whether a watched forward is running."""
        return self._named is not None

    def is_due(self, *, training: bool) -> bool:
        """Whether a forward that begins now is the first one in its mode."""
        return (training, torch.is_grad_enabled()) not in self._done

    def begin(self) -> AbstractContextManager[Any]:
        """Starts to watch. Returns the context manager in which the forward must run; call `end` after it."""
        self._named = set()
        return ExternalReads(self._read) if torch.is_grad_enabled() else ExternalOperands(self._read)

    def end(self, *, training: bool) -> None:
        """Called when the watched forward has ended without an error."""
        if self._named is not None:
            self._done.add((training, torch.is_grad_enabled()))
            self._metadata_only |= self._named
            self._named = None

    def note_named(self, param: Tensor) -> None:
        """Called when code has read `param` by name from its module during a watched forward."""
        if self._named is not None:
            self._named.add(id(param))

    def reads_only_metadata(self, param: Tensor) -> bool:
        """Whether a watched forward read `param` by name, but only its shape, dtype or device."""
        return id(param) in self._metadata_only

    def _read(self, param: nn.Parameter) -> None:
        """Called when an operation is about to read values of `param`."""
        bucket = self._gathering.bucket_of(param)
        if bucket is None or self._gathering.is_held(bucket):
            return
        if self._named is not None:
            self._named.discard(id(param))
        self._metadata_only.discard(id(param))
        self._gathering.hold_for_forward(bucket)
        self._gathering.hold_in_root(bucket)
