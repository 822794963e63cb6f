"""A tensor that is kept between steps: always in memory, or away and in memory only while it is open.

[Note: tensors that are away]
A tensor is *away* if `ShardStore.reserve` returned no tensor for its key, because the store keeps the values where they
cannot be addressed, for example on a disk. Opening it loads the values into a staging buffer. Closing it writes them
back, if they were changed.

The pieces of such a tensor (the optimizer's entries, or their gradients) are the same tensor objects all the time; only
their `data` changes. While the tensor is open, they are views of the buffer. While it is closed, each piece is a
stride-0 view of a NaN of its own, like a sharded parameter. Reading it gives NaN, and in-place arithmetic raises.
torch permits `zero_` and `fill_` on such views, but they change the version of the piece, which is checked at the next
opening: a gradient that was set to zero is then zero, and any other write raises.

The parameters of stage 3 keep one storage that is resized instead ([Note: one storage object]), because autograd saves
views of it. It saves no optimizer entries, so that a few buffers can serve all buckets, and a step allocates nothing.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from ds_zero.comm.works import Done
from ds_zero.interfaces import Reservation, ShardKey, ShardStore, ShardStoreError, Work
from ds_zero.runtime.staging import Staging

Cut = Callable[[Tensor], list[Tensor]]
"""Splits a 1-D tensor over the owned range into its pieces, one for each parameter."""


def second_key(key: ShardKey) -> ShardKey:
    """Returns the key of the second version of a tensor, [Note: two versions of a tensor]."""
    return ShardKey(name=f"{key.name}, second version", kind=key.kind)


class Resting(Protocol):
    """A 1-D tensor that is kept between steps."""

    tensor: Tensor | None
    """The tensor itself; None if it is away."""
    pieces: Sequence[Tensor]
    """Views of it that are optimizer entries or gradients, the same objects for its whole life; may be empty."""

    def opened(self, *, write: bool = False, load: bool = True) -> AbstractContextManager[Tensor]:
        """Context manager that provides the values in memory.

        Args:
            write: store the values when the context is left without an exception.
            load: False if every element will be written before it is read.
        """
        ...

    def prefetch(self) -> None:
        """Starts to load the values, for an `opened` that follows soon."""
        ...

    def abandon(self) -> None:
        """Undoes `prefetch` if the tensor has not been opened since."""
        ...

    def fill(self, values: Tensor) -> None:
        """Sets all values, rounded to the tensor's dtype."""
        ...

    def read_into(self, out: Tensor) -> Work:
        """Starts to copy the values into `out`, which has the same dtype."""
        ...

    def put_grad(self, part: Tensor, *, offset: int, accumulate: bool) -> None:
        """Starts to write `part` at element `offset`, or to add it there. `part` must not be changed afterwards, and
        the tensor must not be read before `settle`.
        """
        ...

    def rounded(self, part: Tensor) -> Tensor:
        """Returns `part` in the dtype of the tensor, on the device where its values are in memory."""
        ...

    def showing(self, values: Tensor) -> AbstractContextManager[None]:
        """Context manager within which the pieces are views of `values`, which are those that the tensor has. It does
        nothing for a tensor in memory.
        """
        ...

    def begin_tentative(self) -> None:
        """From now on values are stored beside those before, [Note: two versions of a tensor]. Does nothing for a
        tensor in memory.
        """
        ...

    def keep(self) -> None:
        """Makes tentative values final."""
        ...

    def revert(self) -> None:
        """Drops tentative values."""
        ...

    def stamp(self) -> tuple[int, ...]:
        """Returns numbers that change with every write to the tensor or to one of its pieces by torch."""
        ...

    def settle(self) -> None:
        """Waits for the operation in progress, if there is one."""
        ...

    def take_zeroed(self) -> frozenset[int]:
        """Returns the indices of the pieces that were set to zero while the tensor was closed, once for each write."""
        ...


class _Stored:
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


class InMemory(_Stored):
    """A tensor that is always in memory, where the store has allocated it."""

    def __init__(
        self, tensor: Tensor, key: ShardKey, store: ShardStore, staging: Staging, cut: Cut | None
    ) -> None:
        super().__init__(key, store, staging)
        self.tensor: Tensor | None = tensor
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


class _Place(enum.Enum):
    """Where the current values of a tensor that is away are."""

    STORED = "stored"
    """In the store. The tensor has no buffer."""
    LOADING = "loading"
    """In the store. A buffer is being filled with them."""
    OPEN = "open"
    """In a buffer, of which the pieces are views. The store's values may be older."""
    STORING = "storing"
    """In a buffer that must not be changed until the store has written its values."""


class Paged(_Stored):
    """A tensor that is away, [Note: tensors that are away]."""

    def __init__(self, item: Reservation, store: ShardStore, staging: Staging, cut: Cut | None) -> None:
        super().__init__(item.key, store, staging)
        self.tensor: Tensor | None = None
        self._numel, self._kind = item.numel, (item.key.kind, item.dtype)
        self._cut = cut
        self._place = _Place.STORED
        self._buffer: Tensor | None = None
        self._users, self._written = 0, False
        self._keys = (item.key, second_key(item.key))
        self._current = 0
        """Index of the key under which the final values are."""
        self._tentative, self._has_tentative = False, False
        """Whether values are stored tentatively now, and whether there are such values."""
        device = self._device = staging.device_of(self._kind)
        forms = (
            cut(torch.zeros(1, dtype=item.dtype, device=device).expand(item.numel)) if cut is not None else []
        )
        self._nans = [torch.full((1,), float("nan"), dtype=item.dtype, device=device) for _ in forms]
        self.pieces: Sequence[Tensor] = [
            nan.expand(form.shape).detach() for nan, form in zip(self._nans, forms, strict=True)
        ]
        self._versions = [piece._version for piece in self.pieces]

    @contextlib.contextmanager
    def opened(self, *, write: bool = False, load: bool = True) -> Iterator[Tensor]:
        tensor = self._open(load)
        try:
            yield tensor
        except BaseException:
            self._close(written=False)
            raise
        self._close(written=write)

    def prefetch(self) -> None:
        if self._place not in (_Place.OPEN, _Place.LOADING):
            self._fetch(load=True)

    def abandon(self) -> None:
        if self._place is _Place.LOADING:
            try:
                self.settle()
            finally:
                self._give_buffer()

    def fill(self, values: Tensor) -> None:
        own = self.rounded(values)
        self._num_writes += 1
        key = self._present_key()
        self._start("store", lambda: self._store.store(key, own), own)
        self.settle()

    def read_into(self, out: Tensor) -> Work:
        if self._place is _Place.STORED or self._has_tentative:
            key = self._keys[self._current]
            self.settle()
            self._start("load", lambda: self._store.load(key, out), out)
            return self
        if self._place is _Place.LOADING:
            _Stored.settle(self)
        out.copy_(self._values())
        return Done()

    def put_grad(self, part: Tensor, *, offset: int, accumulate: bool) -> None:
        assert self._place in (_Place.STORED, _Place.STORING), (
            "a gradient is reduced while the tensor is open"
        )
        self._num_writes += 1
        self._start(
            "add a gradient to",
            lambda: self._store.sink_grad(self._key, part, offset=offset, accumulate=accumulate),
            part,
        )
        self._staging.limit_grads(self)

    def settle(self) -> None:
        try:
            super().settle()
        finally:
            if self._place is _Place.STORING:
                self._give_buffer()

    def rounded(self, part: Tensor) -> Tensor:
        return part.to(self._device, self._kind[1])

    @contextlib.contextmanager
    def showing(self, values: Tensor) -> Iterator[None]:
        assert self._cut is not None and self._place is not _Place.OPEN
        for piece, view in zip(self.pieces, self._cut(values), strict=True):
            piece.data = view
        try:
            yield
        finally:
            self._hide_pieces()

    # --- two versions

    # [Note: two versions of a tensor]
    # A step that may be taken back stores values under a second key. Until `keep` or `revert`, an open tensor has the
    # tentative values, but `read_into` reads those before, with which the backward goes on.

    def begin_tentative(self) -> None:
        self._tentative = True

    def keep(self) -> None:
        self._current ^= self._has_tentative
        self._tentative = self._has_tentative = False

    def revert(self) -> None:
        with contextlib.suppress(ShardStoreError):  # the values are dropped
            self.settle()
        self.abandon()
        self._tentative = self._has_tentative = False

    def _present_key(self) -> ShardKey:
        return self._keys[self._current ^ self._has_tentative]

    def stamp(self) -> tuple[int, ...]:
        return self._num_writes, *(piece._version for piece in self.pieces)

    def take_zeroed(self) -> frozenset[int]:
        if self._place is _Place.OPEN:
            return frozenset()
        zeroed = []
        for index, (piece, nan) in enumerate(zip(self.pieces, self._nans, strict=True)):
            if piece._version == self._versions[index] or not piece.numel():
                continue
            value = nan.item()
            nan.fill_(float("nan"))
            self._versions[index] = piece._version
            if value != 0 or self._key.kind != "grad":
                raise ValueError(
                    f"piece {index} of the {self._key.kind} of bucket {self._key.name!r} was written while "
                    f"{type(self._store).__name__} has its values; the write would be lost. Write by ds_zero.set_full "
                    "or ds_zero.set_local instead"
                )
            zeroed.append(index)
        return frozenset(zeroed)

    # --- the buffer

    def _values(self) -> Tensor:
        assert self._buffer is not None
        return self._buffer[: self._numel]

    def _fetch(self, *, load: bool) -> None:
        self.settle()
        self._buffer = self._staging.take(self._kind)
        values = self._values()
        self._place = _Place.LOADING
        if not load:
            return
        try:
            self._start_load(values)
        except BaseException:
            self._give_buffer()
            raise

    def _start_load(self, values: Tensor) -> None:
        key = self._present_key()
        self._start("load", lambda: self._store.load(key, values), values)

    def _give_buffer(self) -> None:
        assert self._buffer is not None
        self._staging.give(self._kind, self._buffer)
        self._buffer, self._place = None, _Place.STORED

    def _open(self, load: bool) -> Tensor:
        if self._place is not _Place.OPEN:
            zeroed = self.take_zeroed()
            if self._place is not _Place.LOADING:
                self._fetch(load=load)
            try:
                self.settle()
            except BaseException:
                self._give_buffer()
                raise
            self._place = _Place.OPEN
            self._set_pieces(zeroed)
        self._users += 1
        return self._values()

    def _set_pieces(self, zeroed: frozenset[int]) -> None:
        """Makes the pieces views of the buffer, and zeroes those that were set to zero while it was closed."""
        if self._cut is None:
            return
        with torch.no_grad():
            for index, (piece, view) in enumerate(zip(self.pieces, self._cut(self._values()), strict=True)):
                if index in zeroed:
                    view.zero_()
                    self._written = True
                piece.data = view

    def _hide_pieces(self) -> None:
        for piece, nan in zip(self.pieces, self._nans, strict=True):
            piece.data = nan.expand(piece.shape)

    def _close(self, *, written: bool) -> None:
        self._users -= 1
        self._written = self._written or written
        if self._users:
            return
        self._hide_pieces()
        self._versions = [piece._version for piece in self.pieces]
        written, self._written = self._written, False
        self._num_writes += written
        if not written:
            self._give_buffer()
            return
        values = self._values()
        self._has_tentative = self._tentative
        key = self._present_key()
        try:
            self._start("store", lambda: self._store.store(key, values), values)
        except BaseException:
            self._give_buffer()
            raise
        self._place = _Place.STORING
        self._staging.note_storing(self._kind, self)
