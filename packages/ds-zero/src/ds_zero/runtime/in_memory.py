"""A tensor that the store has allocated in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ds_zero.comm.works import Done
from ds_zero.interfaces import ShardKey, ShardStore, ShardStoreError, Work
from ds_zero.runtime.resting import Cut
from ds_zero.runtime.staging import Staging


class Stored:
    """Runs operations of a store on one key, one at a time. Their errors name the key."""

    def __init__(self, key: ShardKey, store: ShardStore, staging: Staging) -> None:
        self._key, self._store, self._staging = key, store, staging
        self._work: Work | None = None
        self._action, self._held = "", None
        self._num_writes = 0

    _held: Tensor | None
    """The tensor that the operation in progress reads or writes; kept alive until it has finished."""

    def _start(self, action: str, start: Callable[[], Work], held: Tensor) -> None:
        self.settle()
        try:
            self._work = start()
        except Exception as error:
            raise self._failed(action, error) from error
        self._action, self._held = action, held

    def settle(self) -> None:
        work, self._work, self._held = self._work, None, None
        if work is None:
            return
        try:
            work.wait()
        except Exception as error:
            raise self._failed(self._action, error) from error

    def wait(self) -> None:
        """Waits for the operation in progress, so that this object can be returned as its `Work`."""
        self.settle()

    def _failed(self, action: str, error: Exception) -> ShardStoreError:
        return ShardStoreError(
            f"{type(self._store).__name__} could not {action} the {self._key.kind} of bucket {self._key.name!r}: "
            f"{type(error).__name__}: {error}. If a step was in progress, it is incomplete: continue from a checkpoint"
        )


class InMemory(Stored):
    """A tensor that is always in memory, where the store has allocated it."""

    def __init__(
        self, tensor: Tensor, key: ShardKey, store: ShardStore, staging: Staging, cut: Cut | None
    ) -> None:
        super().__init__(key, store, staging)
        self.tensor: Tensor | None = tensor
        self.lent: Tensor | None = None
        self._tensor = tensor
        # Detached, so that in-place updates of a piece change the parameter but are not recorded by autograd.
        self.pieces: Sequence[Tensor] = [p.detach() for p in cut(tensor)] if cut is not None else ()

    def __enter__(self) -> Tensor:
        return self._tensor

    def __exit__(self, *_: object) -> None:
        return None

    def opened(self, *, write: bool = False, load: bool = True) -> AbstractContextManager[Tensor]:
        if self._work is not None:
            self.settle()
        return self

    def prefetch(self) -> None:
        return None

    def abandon(self) -> None:
        return None

    def fill(self, values: Tensor) -> None:
        self._tensor.copy_(values)

    def read_into(self, out: Tensor) -> Work:
        out.copy_(self._tensor)
        return Done()

    def put_grad(self, part: Tensor, *, offset: int, accumulate: bool) -> None:
        self._start(
            "add a gradient to",
            lambda: self._store.sink_grad(self._key, part, offset=offset, accumulate=accumulate),
            part,
        )
        self._num_writes += 1
        if part.device == self._tensor.device:
            self.settle()
        else:
            self._staging.limit_grads(self)

    def lend(self, device: torch.device) -> Tensor | None:
        return self._tensor if device == self._tensor.device else None

    def take_back(self) -> None:
        return None

    def settle_puts(self) -> None:
        self.settle()

    def rounded(self, part: Tensor) -> Tensor:
        return part.to(self._tensor.device, self._tensor.dtype)

    def showing(self, values: Tensor) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def begin_tentative(self) -> None:
        return None

    def keep(self) -> None:
        return None

    def revert(self) -> None:
        return None

    def stamp(self) -> tuple[int, ...]:
        return self._num_writes, self._tensor._version

    def take_zeroed(self) -> frozenset[int]:
        return frozenset()
