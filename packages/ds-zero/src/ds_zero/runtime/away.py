"""A tensor that is away, [Note: tensors that are away]."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_zero.comm.works import Done
from ds_zero.interfaces import Reservation, ShardKey, ShardStore, ShardStoreError, Work
from ds_zero.runtime.in_memory import Stored
from ds_zero.runtime.resting import Cut, second_key
from ds_zero.runtime.staging import Staging
from ds_zero.tensors.storage import same_place


class _Place(enum.Enum):
    """Where the current values of a tensor that is away are."""

    STORED = "stored"
    """In the store. The tensor has no buffer."""
    LOADING = "loading"
    """In the store. A buffer is being filled with them."""
    OPEN = "open"
    """In a buffer, of which the pieces are views. The store's values may be older."""
    STORING = "storing"
    """In a buffer that must not be changed until the store has written its values. It belongs to this tensor until
    `Staging` needs it for another one, so that a tensor that is opened again soon is not loaded."""


@dataclass(frozen=True)
class _Copying:
    """The load of a tensor into a buffer, from which `wait` copies it."""

    tensor: Paged
    out: Tensor

    def wait(self) -> None:
        self.tensor.copy_into(self.out)


class Paged(Stored):
    """A tensor that is away, [Note: tensors that are away]."""

    def __init__(self, item: Reservation, store: ShardStore, staging: Staging, cut: Cut | None) -> None:
        super().__init__(item.key, store, staging)
        self.tensor: Tensor | None = None
        self._numel, self._kind = item.numel, (item.key.kind, item.dtype)
        self._cut = cut
        self._place = _Place.STORED
        self._buffer: Tensor | None = None
        self.lent: Tensor | None = None
        self._lent_buffer: Tensor | None = None
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
        if self._place is _Place.STORED:
            self._fetch(load=True)

    def abandon(self) -> None:
        if self._place is _Place.LOADING:
            try:
                self.settle()
            finally:
                self._give_buffer()

    def fill(self, values: Tensor) -> None:
        self.abandon()  # older values
        own = self.rounded(values)
        self._num_writes += 1
        key = self._present_key()
        self._start("store", lambda: self._store.store(key, own), own)
        self.settle()

    # [Note: loading through a buffer]
    # On a CPU, `out` is ordinary memory in pages of 4 KiB, and does not begin at one. A disk reads at 2.4 GB/s into
    # staging buffers, which a store allocates on large pages, and at 0.9 GB/s into pages of 4 KiB (measured: a request
    # has a segment for each page). Into the memory of an accelerator it cannot read. So values are loaded into a buffer
    # and copied when they have arrived.

    def read_into(self, out: Tensor) -> Work:
        if self._has_tentative:
            key = self._keys[self._current]
            self.settle()
            self._start("load", lambda: self._store.load(key, out), out)
            return self
        if self._place is _Place.STORED:
            self._fetch(load=True)
            return _Copying(self, out)
        self.copy_into(out)
        return Done()

    def copy_into(self, out: Tensor) -> None:
        """Copies the values of a buffer, [Note: loading through a buffer], or loads them if it was given back."""
        if self._place is _Place.STORED:
            self._fetch(load=True)
        loading = self._place is _Place.LOADING
        try:
            if loading:
                Stored.settle(self)
            out.copy_(self._values())
        finally:
            if loading:
                self._give_buffer()

    def put_grad(self, part: Tensor, *, offset: int, accumulate: bool) -> None:
        assert self._place in (_Place.STORED, _Place.STORING), (
            "a gradient is reduced while the tensor is open"
        )
        self._num_writes += 1
        lent = self._lent_buffer
        assert lent is None or (same_place(lent, part) and part.numel() == self._numel and not accumulate)
        try:
            self._start(
                "add a gradient to",
                lambda: self._store.sink_grad(self._key, part, offset=offset, accumulate=accumulate),
                part,
            )
        except BaseException:
            self.take_back()
            raise
        if lent is None:
            self._staging.limit_grads(self)
            return
        self.lent = self._lent_buffer = None
        self._buffer, self._place = lent, _Place.STORING
        self._staging.note_storing(self._kind, self)

    def lend(self, device: torch.device) -> Tensor | None:
        if self._place not in (_Place.STORED, _Place.STORING) or not self._staging.is_on(self._kind, device):
            return None
        self.settle()
        self.take_back()
        self._lent_buffer = self._staging.take(self._kind)
        self.lent = self._lent_buffer[: self._numel]
        return self.lent

    def take_back(self) -> None:
        buffer, self.lent, self._lent_buffer = self._lent_buffer, None, None
        if buffer is not None:
            self._staging.give(self._kind, buffer)

    def settle_puts(self) -> None:
        if self._place is not _Place.STORING:
            self.settle()

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
            if self._place is _Place.STORED:
                self._fetch(load=load)
            try:
                Stored.settle(self)  # keeps the buffer of a tensor that is being stored
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
