"""What autograd keeps in place of a saved tensor.

[Note: pieces of memory]
A tensor that autograd saves is a view of a storage, and other saved tensors may be views of it, too: the queries, keys
and values of one projection, an activation that two layers use. So not tensors are moved, but *pieces*: ranges of bytes
of a storage, mostly all of it. Several `SavedTensor`s refer to one piece, each with its own shape and strides, so that
kernels find in backward exactly the layout that they would find without offload. A piece is identified by its storage,
as long as the storage lives, and by the version counter of the tensor.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ds_offload.activations.places import Moved, Return

if TYPE_CHECKING:
    from ds_offload.activations.recording import Recording

_CHANGED = (
    "a tensor of shape {shape}, saved for backward, was changed in place {when}: its version is {now}, it was saved at "
    "version {then}. Change a copy instead"
)


def as_bytes(storage: torch.UntypedStorage) -> Tensor:
    """Returns a 1-D uint8 tensor of a whole storage."""
    with torch.no_grad():
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class _WeakBytes:
    """Refers to 1-D uint8 memory without keeping it alive."""

    def __init__(self, flat: Tensor) -> None:
        # Torch never frees a tensor without memory, as a plan has them, that is made of a storage. There, `flat` is the
        # base of all views of the memory, and lives as long as they do.
        self._tensor = weakref.ref(flat) if _is_without_memory(flat) else None
        self._storage = StorageWeakRef(flat.untyped_storage()) if self._tensor is None else None
        self._start, self._num_bytes = int(flat.storage_offset()), flat.numel()

    def get(self) -> Tensor | None:
        """Returns the bytes, if anybody else keeps them."""
        if self._storage is None:
            assert self._tensor is not None
            return self._tensor()
        storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            return None
        return as_bytes(storage)[self._start : self._start + self._num_bytes]


def _is_without_memory(flat: Tensor) -> bool:
    return flat.untyped_storage().device.type == "meta"


class Piece:
    """A range of bytes of a storage that was moved. It is freed with the last `SavedTensor` that refers to it."""

    def __init__(
        self, recording: Recording, tensor: Tensor, begin: int, num_bytes: int, moved: Moved
    ) -> None:
        self.recording = recording
        self.index = -1
        """Position in the order of the forward; set by the recording."""
        self.section = recording.section
        self.begin, self.num_bytes = begin, num_bytes
        self.version = tensor._version
        self.users: weakref.WeakSet[SavedTensor] = weakref.WeakSet()
        self._moved = moved
        self._source: Tensor | None = tensor.detach()  # it keeps the memory, and shares the version counter
        self._shape = tuple(tensor.shape)
        self._torn = False
        self._returning: Return | None = None
        self._flat: Tensor | None = None
        self._waiting: weakref.WeakSet[SavedTensor] | None = None
        """Those that have not got their tensor yet since the last load."""
        self._weak: _WeakBytes | None = None
        weakref.finalize(self, moved.free).atexit = False

    def release_source(self, *, wait: bool) -> bool:
        """Frees the memory on the device if it is not needed for the copy any more, or, with `wait`, as soon as later
        work of the device may reuse it. Returns whether it is freed.
        """
        if self._source is None:
            return True
        if not self._moved.has_left():
            if not wait:
                return False
            self._moved.leave()
        # The copy may have read what was there before the change, after it, or some of both.
        self._torn = self._source._version != self.version
        self._source = None
        return True

    @property
    def is_loading(self) -> bool:
        """Whether its bytes are on their way, or on the device already."""
        return self._returning is not None or self._flat is not None

    def start_load(self) -> None:
        """Begins to bring the bytes back."""
        if self.is_loading:
            return
        self.release_source(wait=True)
        if self._torn:
            raise RuntimeError(
                _CHANGED.format(
                    shape=self._shape,
                    when="while it was copied to the host",
                    now="a later one",
                    then=self.version,
                )
            )
        self._returning = self._moved.load()
        self._waiting = weakref.WeakSet(self.users)

    def poll(self) -> None:
        """Goes on with bringing the bytes back, if they are on their way."""
        if self._returning is not None:
            self._returning.poll()

    def flat(self, user: SavedTensor) -> Tensor:
        """Returns the bytes on the device, for one of `users`. They are kept until all users have asked for them."""
        out = self._flat if self._flat is not None else self._alive()
        if out is None:
            statistics = self.recording.statistics
            statistics.loaded_tensors += 1
            statistics.late_tensors += self._returning is None
            self.start_load()
            assert self._returning is not None
            out = self._flat = self._returning.wait()
            self._returning = None
            self._weak = _WeakBytes(out)
        if self._waiting is not None:
            self._waiting.discard(user)
            if not self._waiting:
                self._flat = self._waiting = None
        return out

    def _alive(self) -> Tensor | None:
        """Returns what the last load has brought, if a backward still uses it."""
        if self._weak is None or self._returning is not None:
            return None
        return self._weak.get()


class SavedTensor:
    """A tensor that autograd saved, as a view of a piece."""

    __slots__ = ("__weakref__", "_dtype", "_offset", "_shape", "_stride", "piece")

    def __init__(self, piece: Piece, tensor: Tensor) -> None:
        self.piece = piece
        self._dtype, self._shape, self._stride = tensor.dtype, tensor.shape, tensor.stride()
        self._offset = tensor.storage_offset() * tensor.element_size() - piece.begin
        piece.users.add(self)

    def restore(self) -> Tensor:
        """Returns the tensor, on its device, with its shape and strides."""
        flat = self.piece.recording.fetch(self.piece, self)
        size = self._dtype.itemsize
        with torch.no_grad():
            if _is_without_memory(flat):
                whole = flat[: flat.numel() // size * size].view(self._dtype)
                return whole.as_strided(self._shape, self._stride, self._offset // size)
            offset = (flat.storage_offset() + self._offset) // size
            out = torch.empty(0, dtype=self._dtype, device=flat.device)
            return out.set_(flat.untyped_storage(), offset, self._shape, self._stride)


@dataclass(frozen=True)
class Mark:
    """A point of a forward."""

    recording: Recording
    index: int
    """Number of pieces that were moved before."""
    section: int


class KeptTensor:
    """A tensor that stays on the device. Torch does not check versions of tensors that went through hooks."""

    __slots__ = ("_mark", "_tensor", "_version")

    def __init__(self, tensor: Tensor, mark: Mark | None = None) -> None:
        """
        Args:
            mark: where it was saved, if others were moved before.
        """
        self._mark = mark
        # Not the tensor itself: the output of an operation would keep the operation alive that keeps the output.
        self._tensor = tensor if tensor.is_leaf else tensor.detach()
        self._version = None if tensor.is_inference() else tensor._version

    def restore(self) -> Tensor:
        """Returns the tensor.

        Raises:
            RuntimeError: it was changed in place.
        """
        if self._mark is not None:
            self._mark.recording.reach(self._mark)
        if self._version is not None and self._tensor._version != self._version:
            raise RuntimeError(
                _CHANGED.format(
                    shape=tuple(self._tensor.shape),
                    when="before backward used it",
                    now=self._tensor._version,
                    then=self._version,
                )
            )
        return self._tensor


def byte_range(tensor: Tensor) -> tuple[int, int]:
    """Returns the bytes of a storage, from the first to after the last, in which a strided tensor has its elements."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = tensor.element_size()
    begin = int(tensor.storage_offset()) * size
    return begin, begin + (last + 1) * size
