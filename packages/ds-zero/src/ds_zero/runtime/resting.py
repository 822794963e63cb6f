"""One tensor at rest: in memory all the time, or away and in memory only while somebody has opened it.

[Note: tensors that are away]
A store that maps a key to no tensor keeps it where nobody can address it, on a disk for example. Such a tensor is
loaded into a staging buffer when it is opened, and stored from there when it is closed, if it was written. Tensors that
others hold and that look into it (the optimizer's entries, their gradients) stay the same objects: while it is open
they are views of the buffer, meanwhile each is a stride-0 view of a NaN of its own, as sharded parameters are. Reading
one is never a crash. In-place arithmetic raises. `zero_` and `fill_`, which torch lets through on such views, change
the version of the tensor: a gradient that was set to zero is zero when it is opened next, everything else that was
written raises then.

Here the pieces change their `data`, where the parameters of stage 3 keep one storage that is resized ([Note: one
storage object]): nobody saves an optimizer's entry for a backward, so a few buffers can serve all buckets, and a step
allocates nothing.
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
"""From a tensor over the owned range to its pieces, one for each parameter."""


class Resting(Protocol):
    """One tensor at rest, 1-D."""

    tensor: Tensor | None
    """The tensor itself; None where it is away."""
    pieces: Sequence[Tensor]
    """What others hold of it, the same objects for its whole life; empty where nobody does."""

    def opened(self, *, write: bool = False, load: bool = True) -> AbstractContextManager[Tensor]:
        """Its values in memory. After `write` they are at rest when the context is left without an exception.

        Args:
            load: False where every element will be written before it is read.
        """
        ...

    def prefetch(self) -> None:
        """Begin to load what will be opened next."""
        ...

    def abandon(self) -> None:
        """Undo `prefetch` where nobody has opened it since."""
        ...

    def fill(self, values: Tensor) -> None:
        """Put values to rest, rounded to the dtype at rest."""
        ...

    def read_into(self, out: Tensor) -> Work:
        """Copy the values into `out`, of the same dtype."""
        ...

    def sink(self, part: Tensor, *, offset: int, accumulate: bool) -> None:
        """Put (or add) `part`, which nobody may change afterwards, at `offset`. Before `settle` nobody may read it."""
        ...

    def settle(self) -> None:
        """Return when no work is under way."""
        ...

    def take_zeroed(self) -> frozenset[int]:
        """Indices of the pieces that were set to zero since they were shown; they do not count as written any more."""
        ...


class _Stored:
    """Works on one key of a store, one after the other, whose errors name the key."""

    def __init__(self, key: ShardKey, store: ShardStore, staging: Staging) -> None:
        self._key, self._store, self._staging = key, store, staging
        self._work: Work | None = None
        self._action, self._held = "", None

    _held: Tensor | None
    """What the work under way reads or writes."""

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
        """As `settle`: this is the work under way."""
        self.settle()

    def _failed(self, action: str, error: Exception) -> ShardStoreError:
        return ShardStoreError(
            f"{type(self._store).__name__} could not {action} the {self._key.kind} of bucket {self._key.name!r}: "
            f"{type(error).__name__}: {error}. A step that was in progress is incomplete: continue from a checkpoint"
        )


class InMemory(_Stored):
    """A tensor that the store maps."""

    def __init__(
        self, tensor: Tensor, key: ShardKey, store: ShardStore, staging: Staging, cut: Cut | None
    ) -> None:
        super().__init__(key, store, staging)
        self.tensor: Tensor | None = tensor
        self._tensor = tensor
        # detach: `data` of a view of a permanent buffer, so that in-place updates are seen by the parameter but not by
        # autograd.
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

    def sink(self, part: Tensor, *, offset: int, accumulate: bool) -> None:
        self._start(
            "add a gradient to",
            lambda: self._store.sink_grad(self._key, part, offset=offset, accumulate=accumulate),
            part,
        )
        if part.device == self._tensor.device:
            self.settle()
        else:
            self._staging.sink(self)

    def take_zeroed(self) -> frozenset[int]:
        return frozenset()


class _Stay(enum.Enum):
    """Who holds the values of a tensor that is away."""

    AWAY = "away"
    """The store alone."""
    COMING = "coming"
    """The store; a buffer is being filled."""
    HERE = "here"
    """A buffer, into which the pieces look; the store's values may be older."""
    LEAVING = "leaving"
    """A buffer that nobody may change, until the store has taken its values."""


class Paged(_Stored):
    """A tensor that the store does not map, [Note: tensors that are away]."""

    def __init__(self, item: Reservation, store: ShardStore, staging: Staging, cut: Cut | None) -> None:
        super().__init__(item.key, store, staging)
        self.tensor: Tensor | None = None
        self._numel, self._kind = item.numel, (item.key.kind, item.dtype)
        self._cut = cut
        self._stay = _Stay.AWAY
        self._buffer: Tensor | None = None
        self._users, self._written = 0, False
        device = self._device = staging.device_of(self._kind)
        forms = (
            cut(torch.zeros(1, dtype=item.dtype, device=device).expand(item.numel)) if cut is not None else []
        )
        self._holes = [torch.full((1,), float("nan"), dtype=item.dtype, device=device) for _ in forms]
        self.pieces: Sequence[Tensor] = [
            hole.expand(form.shape).detach() for hole, form in zip(self._holes, forms, strict=True)
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
        if self._stay not in (_Stay.HERE, _Stay.COMING):
            self._fetch(load=True)

    def abandon(self) -> None:
        if self._stay is _Stay.COMING:
            try:
                self.settle()
            finally:
                self._give_buffer()

    def fill(self, values: Tensor) -> None:
        own = values.to(self._device, self._kind[1])
        self._start("store", lambda: self._store.store(self._key, own), own)
        self.settle()

    def read_into(self, out: Tensor) -> Work:
        if self._stay is _Stay.AWAY:
            self._start("load", lambda: self._store.load(self._key, out), out)
            return self
        if self._stay is _Stay.COMING:
            _Stored.settle(self)
        out.copy_(self._values())
        return Done()

    def sink(self, part: Tensor, *, offset: int, accumulate: bool) -> None:
        assert self._stay in (_Stay.AWAY, _Stay.LEAVING), "gradients arrive while nobody reads them"
        self._start(
            "add a gradient to",
            lambda: self._store.sink_grad(self._key, part, offset=offset, accumulate=accumulate),
            part,
        )
        self._staging.sink(self)

    def settle(self) -> None:
        try:
            super().settle()
        finally:
            if self._stay is _Stay.LEAVING:
                self._give_buffer()

    def take_zeroed(self) -> frozenset[int]:
        if self._stay is _Stay.HERE:
            return frozenset()
        zeroed = []
        for index, (piece, hole) in enumerate(zip(self.pieces, self._holes, strict=True)):
            if piece._version == self._versions[index] or not piece.numel():
                continue
            value = hole.item()
            hole.fill_(float("nan"))
            self._versions[index] = piece._version
            if value != 0 or self._key.kind != "grad":
                raise ValueError(
                    f"piece {index} of the {self._key.kind} of bucket {self._key.name!r} was written while "
                    f"{type(self._store).__name__} has its values; the write would be lost. Use ds_zero.set_full or "
                    "ds_zero.set_local"
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
        self._stay = _Stay.COMING
        if not load:
            return
        try:
            self._start_load(values)
        except BaseException:
            self._give_buffer()
            raise

    def _start_load(self, values: Tensor) -> None:
        self._start("load", lambda: self._store.load(self._key, values), values)

    def _give_buffer(self) -> None:
        assert self._buffer is not None
        self._staging.give(self._kind, self._buffer)
        self._buffer, self._stay = None, _Stay.AWAY

    def _open(self, load: bool) -> Tensor:
        if self._stay is not _Stay.HERE:
            zeroed = self.take_zeroed()
            if self._stay is not _Stay.COMING:
                self._fetch(load=load)
            try:
                self.settle()
            except BaseException:
                self._give_buffer()
                raise
            self._stay = _Stay.HERE
            self._show(zeroed)
        self._users += 1
        return self._values()

    def _show(self, zeroed: frozenset[int]) -> None:
        if self._cut is None:
            return
        with torch.no_grad():
            for index, (piece, view) in enumerate(zip(self.pieces, self._cut(self._values()), strict=True)):
                if index in zeroed:
                    view.zero_()
                    self._written = True
                piece.data = view

    def _close(self, *, written: bool) -> None:
        self._users -= 1
        self._written = self._written or written
        if self._users:
            return
        for piece, hole in zip(self.pieces, self._holes, strict=True):
            piece.data = hole.expand(piece.shape)
        self._versions = [piece._version for piece in self.pieces]
        written, self._written = self._written, False
        if not written:
            self._give_buffer()
            return
        values = self._values()
        try:
            self._start("store", lambda: self._store.store(self._key, values), values)
        except BaseException:
            self._give_buffer()
            raise
        self._stay = _Stay.LEAVING
        self._staging.leave(self._kind, self)
