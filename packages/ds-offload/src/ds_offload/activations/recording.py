"""What one forward has moved, in its order, and how it returns in backward."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ds_offload.activations.options import ActivationOptions, ActivationStatistics
from ds_offload.activations.saved import Mark, Piece, SavedTensor, byte_range


@dataclass(frozen=True)
class _Seen:
    """A storage of which a tensor was saved. The weak reference keeps its address from being used again."""

    storage: StorageWeakRef
    piece: weakref.ref[Piece] | None
    """The newest piece of it; None if it stays on the device."""


class Recording:
    """The pieces of one forward. Backward asks for them in about the opposite order, so that when it asks for one,
    those before it are brought back, too.
    """

    def __init__(self, options: ActivationOptions, statistics: ActivationStatistics) -> None:
        self.section = 0
        """Number of beginnings and ends of layers so far. Tensors of layer k are saved in section 2 k + 1."""
        self.saved_bytes = 0
        """Bytes of all tensors that may be moved, each piece of memory counted once."""
        self.kept_bytes = 0
        """Those of them that stay on the device."""
        self.parts: list[tuple[int, int]] = []
        """In the order of the forward, (section, bytes in it); without layers, one entry for each piece of memory."""
        self.names: dict[int, str] = {}
        """Section -> name of the layer that computes in it."""
        self.statistics = statistics
        self._options = options
        self._pieces: list[weakref.ref[Piece]] = []
        self._seen: dict[int, _Seen] = {}
        # Reentrant, because a graph may be released within.
        self._lock = threading.RLock()
        self._last = -1
        """Number of the piece that backward asked for last."""
        self._next = 0
        """In this backward, the pieces from this number on have begun to return, or are not needed."""

    def find(self, tensor: Tensor) -> Piece | None:
        """Returns the piece that contains the values of a tensor, if there is one already."""
        seen = self._seen.get(tensor.untyped_storage()._cdata)
        piece = seen.piece() if seen is not None and seen.piece is not None else None
        if seen is None or piece is None or seen.storage.expired() or piece.version != tensor._version:
            return None
        begin, end = byte_range(tensor)
        return piece if piece.begin <= begin and end <= piece.begin + piece.num_bytes else None

    def is_kept(self, tensor: Tensor) -> bool:
        """Whether the storage of a tensor is counted in `kept_bytes` already."""
        seen = self._seen.get(tensor.untyped_storage()._cdata)
        return seen is not None and seen.piece is None and not seen.storage.expired()

    def add(self, tensor: Tensor, num_bytes: int, piece: Piece | None) -> None:
        """Notes a tensor that was saved, and the piece into which it was moved; None if it stays on the device."""
        storage = tensor.untyped_storage()
        self.saved_bytes += num_bytes
        if self.section and self.parts and self.parts[-1][0] == self.section:
            self.parts[-1] = (self.section, self.parts[-1][1] + num_bytes)
        else:
            self.parts.append((self.section, num_bytes))
        if piece is None:
            self.kept_bytes += num_bytes
        else:
            piece.index = len(self._pieces)
            self._pieces.append(weakref.ref(piece))
        self._seen[storage._cdata] = _Seen(StorageWeakRef(storage), weakref.ref(piece) if piece else None)

    def end(self) -> None:
        """The forward has ended."""
        self._seen.clear()

    def mark(self) -> Mark | None:
        """Returns the present point; None if nothing was moved before."""
        return Mark(self, len(self._pieces), self.section) if self._pieces else None

    def fetch(self, piece: Piece, user: SavedTensor) -> Tensor:
        """Returns the bytes of a piece, and begins to bring back those that are needed next."""
        with self._lock:
            self._go_on(piece.index)
            out = piece.flat(user)
            self._next = min(self._next, piece.index)
            self._load_ahead(piece.index, piece.section)
            return out

    def reach(self, mark: Mark) -> None:
        """Begins to bring back what is needed after a point that backward has reached."""
        with self._lock:
            self._go_on(mark.index)
            self._load_ahead(mark.index, mark.section)

    def _go_on(self, index: int) -> None:
        """Backward is at piece `index`, or behind it."""
        if index > self._last:  # another backward begins
            self._next = index
        self._last = index
        for ref in self._pieces[self._next : index]:
            piece = ref()
            if piece is not None:
                piece.poll()

    def _load_ahead(self, index: int, section: int) -> None:
        """Begins to bring back pieces before number `index`, which was saved in `section`."""
        by_layer = self._options.prefetch_bytes is None and self.section > 0
        limit = self._options.ahead_bytes
        waiting = self._waiting_bytes(index)
        while self._next > 0 and limit > 0:
            piece = self._pieces[self._next - 1]()
            if piece is not None:
                # Two sections before the one in which layer k saves is that of layer k - 1. It may have saved nothing.
                ahead = piece.section < section - 2 if by_layer else waiting + piece.num_bytes > limit
                if ahead and waiting:
                    return
                piece.start_load()
                waiting += piece.num_bytes
            self._next -= 1

    def _waiting_bytes(self, index: int) -> int:
        """Bytes of the pieces before `index` that have begun to return, and that nobody has asked for."""
        pieces = (ref() for ref in self._pieces[self._next : index])
        return sum(p.num_bytes for p in pieces if p is not None and p.is_loading)
