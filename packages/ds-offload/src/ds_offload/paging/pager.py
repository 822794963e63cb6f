"""Moves pages between a store and a few buffers in memory."""

from __future__ import annotations

import contextlib
import enum
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.interfaces import KeepsStates, PageKey, PageReservation, Store, Tier, Work
from ds_offload.paging.pages import Page
from ds_offload.paging.tensors import local


class PagingError(RuntimeError):
    """A store failed to load or store a page of optimizer states."""


class _Place(enum.Enum):
    """Where the current values of a page are."""

    STORED = "stored"
    """In the store. The page has no buffer."""
    LOADING = "loading"
    """In the store. A buffer is being filled with them."""
    OPEN = "open"
    """In a buffer. The values in the store may be older."""
    STORING = "storing"
    """In a buffer, which must not be changed until the store has written it."""
    CACHED = "cached"
    """Both in the store and in a buffer, which is free for other pages."""


@dataclass(eq=False)
class _Held:
    """A page and its place."""

    page: Page
    keys: tuple[PageKey, PageKey]
    """The two places of the page in the store, [Note: two versions of a page]. The second is reserved when needed."""
    tier: Tier | None = None
    """Where the store keeps it; None: where it keeps all states."""
    current: int = 0
    """Index of the key under which the final values are stored."""
    is_tentative: bool = False
    """Whether the other key has values of a step that may be taken back. They count until then."""
    has_both: bool = False
    """Whether both places are reserved."""
    is_in_memory: bool = False
    """Whether the store keeps it in addressable memory."""
    place: _Place = _Place.STORED
    buffer: Tensor | None = None
    work: Work | None = None
    in_place: list[Tensor] | None = None
    """The memory under both keys, as far as reserved, if the store keeps the page where it is stepped. Then it is
    always open, and needs no buffer."""

    @property
    def key(self) -> PageKey:
        """The key under which the values that count now are stored."""
        return self.keys[self.current ^ self.is_tentative]

    @property
    def values(self) -> Tensor:
        """The bytes of the page in its buffer."""
        if self.in_place is not None:
            return self.in_place[self.current ^ self.is_tentative]
        assert self.buffer is not None
        return self.buffer[: self.page.num_bytes]


class Pager:
    """The pages of one optimizer: in a store, and up to `num_buffers` of them in memory."""

    def __init__(self, store: Store, *, num_buffers: int, read_ahead: int, write_behind: bool) -> None:
        """
        Args:
            read_ahead: number of following pages that are loaded while one is open.
            write_behind: whether `close` returns before the page is written.
        """
        self._store = store
        self._num_buffers = num_buffers
        self._read_ahead, self._write_behind = read_ahead, write_behind
        self._pages: list[_Held] = []
        self._free: list[Tensor] = []
        self._num_made = 0
        self._device: torch.device | None = None
        self._recent: OrderedDict[int, None] = OrderedDict()
        """Indices of the pages that have a buffer, the one that was used longest ago first."""
        self._tentative = False
        """Whether pages are stored tentatively now."""
        self._next: dict[bool, dict[int, int]] = {True: {}, False: {}}
        """Tentatively or not -> page -> the page that was stepped after it in the last such steps."""
        self._last: tuple[bool, int] | None = None
        """The page that was stepped last, and whether tentatively."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages in the store, in one version."""
        return sum(held.page.num_bytes for held in self._pages)

    @property
    def second_bytes(self) -> int:
        """Bytes of the second versions of pages in the store, [Note: two versions of a page]."""
        return sum(held.page.num_bytes for held in self._pages if held.has_both)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers in memory, and of pages that are always in memory."""
        buffers = [*self._free, *(held.buffer for held in self._pages if held.buffer is not None)]
        buffers += [memory for held in self._pages for memory in held.in_place or ()]
        return sum(buffer.nbytes for buffer in buffers)

    def tier_of(self, param: Tensor) -> Tier | None:
        """Returns where the store wants the states of a parameter; None: it has no opinion."""
        return self._store.state_tier(local(param)) if isinstance(self._store, KeepsStates) else None

    def is_in_memory(self, index: int) -> bool:
        """Whether the store keeps a page in addressable memory."""
        return self._pages[index].is_in_memory

    def page(self, index: int) -> Page:
        """Returns the layout of a page."""
        return self._pages[index].page

    def add(self, pages: list[Page], device: torch.device, tier: Tier | None = None) -> range:
        """Reserves new pages, whose values are zero, for parameters on `device`. Returns their indices."""
        first = len(self._pages)
        held = [_Held(page, self._keys(first + i), tier) for i, page in enumerate(pages)]
        self._device = self._device or device
        mapped = self._store.reserve(
            [PageReservation(key=h.keys[0], numel=h.page.num_bytes, device=device, tier=tier) for h in held]
        )
        for one in held:
            memory = mapped.get(one.keys[0])
            one.is_in_memory = memory is not None
            if memory is not None and memory.device == device:
                one.place, one.in_place = _Place.OPEN, [memory]
        self._pages += held
        return range(first, len(self._pages))

    def _keys(self, number: int) -> tuple[PageKey, PageKey]:
        first, second = (
            PageKey(name=f"page {number}{version}", owner=id(self)) for version in ("", ", second version")
        )
        return first, second

    def open(self, index: int, *, load: bool = True, stepping: bool = False) -> Tensor:
        """Returns the bytes of a page in a buffer, until `close`; meanwhile starts to load the next pages.

        Args:
            load: False if every byte that matters will be written.
            stepping: for a step. The next pages are those that followed in the last steps of this kind; otherwise
                those with the next numbers.
        """
        held = self._pages[index]
        if held.in_place is not None:
            if self._tentative and not held.is_tentative:
                self._reserve_second(held)
                old, held.is_tentative = held.values, True
                held.values.copy_(old)
            return held.values
        self._settle(held)
        if held.place is not _Place.CACHED:
            held.buffer = self._take(held.page.num_bytes)
            if load:
                self._start(held, _Place.LOADING, lambda: self._store.load(held.key, held.values))
                self._settle(held)
        held.place = _Place.OPEN
        self._touch(index)
        following = self._note_step(index) if stepping else {}
        for _ in range(self._read_ahead):
            index = following.get(index, (index + 1) % len(self._pages))
            self._prefetch(index)
        return held.values

    def _note_step(self, index: int) -> dict[int, int]:
        """Notes that a page is stepped. Returns the order in which pages are expected to be."""
        following, last = self._next[self._tentative], self._last
        if last is not None and last[0] == self._tentative and last[1] != index:
            following[last[1]] = index
        self._last = self._tentative, index
        return following

    def close(self, index: int, *, written: bool) -> None:
        """Ends `open`; stores the page if it was changed."""
        held = self._pages[index]
        assert held.place is _Place.OPEN
        if held.in_place is not None:
            return
        if not written:
            self._give(index)
            return
        if self._tentative:
            self._reserve_second(held)
        held.is_tentative = self._tentative
        self._start(held, _Place.STORING, lambda: self._store.store(held.key, held.values))
        if not self._write_behind:
            self._settle(held)

    # --- versions

    # [Note: two versions of a page]
    # A step that may be taken back writes pages beside those that it read. So taking it back only means to go on
    # reading the older ones, and making it final to read the newer ones. Neither moves a byte.

    def begin_tentative(self) -> None:
        """From now on pages are stored tentatively, until `keep` or `revert`."""
        self._tentative = True

    @property
    def is_tentative(self) -> bool:
        """Whether pages are stored tentatively now."""
        return self._tentative

    def keep(self) -> None:
        """Makes tentative values final."""
        for held in self._pages:
            held.current ^= held.is_tentative
            held.is_tentative = False
        self._tentative = False

    def revert(self, indices: Collection[int] | None = None) -> None:
        """Drops the tentative values of some pages; without `indices`, of all, and ends storing tentatively."""
        for index, held in enumerate(self._pages):
            if not held.is_tentative or (indices is not None and index not in indices):
                continue
            with contextlib.suppress(Exception):  # the values are dropped
                self._settle(held)
            if held.buffer is not None:
                self._give(index)
            held.is_tentative = False
        if indices is None:
            self._tentative = False

    def _reserve_second(self, held: _Held) -> None:
        """Reserves the second place of a page, and of all others that have none, in one call."""
        if held.has_both:
            return
        missing = [h for h in self._pages if not h.has_both]
        assert self._device is not None
        mapped = self._store.reserve(
            [
                PageReservation(
                    key=h.keys[1],
                    numel=h.page.num_bytes,
                    device=self._device if h.in_place is None else h.in_place[0].device,
                    tier=h.tier,
                    partition="second",
                )
                for h in missing
            ]
        )
        for h in missing:
            h.has_both = True
            if h.in_place is not None:
                h.in_place.append(mapped[h.keys[1]])

    def settle(self) -> None:
        """Waits for all operations in progress."""
        for held in self._pages:
            self._settle(held)

    def destroy(self) -> None:
        """Frees pages and buffers, whatever is in progress."""
        for held in self._pages:
            if held.work is not None:
                with contextlib.suppress(Exception):  # the values are dropped
                    held.work.wait()
            self._store.release(held.keys[0])
            if held.has_both:
                self._store.release(held.keys[1])
        self._pages.clear()
        self._free.clear()
        self._recent.clear()
        self._num_made = 0
        self._next = {True: {}, False: {}}
        self._last = None
        self._tentative = False

    # --- operations

    def _prefetch(self, index: int) -> None:
        held = self._pages[index]
        if held.place is not _Place.STORED:
            return
        if not self._free and self._num_made >= self._num_buffers and not self._evictable():
            return
        held.buffer = self._take(held.page.num_bytes)
        self._start(held, _Place.LOADING, lambda: self._store.load(held.key, held.values))
        self._touch(index)

    def _start(self, held: _Held, place: _Place, start: Callable[[], Work]) -> None:
        try:
            held.work = start()
        except Exception as error:
            raise self._failed(held, place, error) from error
        held.place = place

    def _settle(self, held: _Held) -> None:
        """Waits for the page's operation. Its buffer and the store then have the same values."""
        work, held.work = held.work, None
        if work is None:
            return
        place = held.place
        try:
            work.wait()
        except Exception as error:
            raise self._failed(held, place, error) from error
        held.place = _Place.CACHED

    def _failed(self, held: _Held, place: _Place, error: Exception) -> PagingError:
        index = self._pages.index(held)
        held.work = None
        if held.buffer is not None:
            self._give(index)
        action = "load" if place is _Place.LOADING else "store"
        return PagingError(
            f"{type(self._store).__name__} could not {action} the optimizer states of {held.keys[0].name}: "
            f"{type(error).__name__}: {error}. If a step was in progress, it is incomplete: continue from a checkpoint"
        )

    # --- buffers

    def _touch(self, index: int) -> None:
        self._recent[index] = None
        self._recent.move_to_end(index)

    def _give(self, index: int) -> None:
        held = self._pages[index]
        assert held.buffer is not None
        self._free.append(held.buffer)
        held.buffer, held.place = None, _Place.STORED
        self._recent.pop(index, None)

    def _evictable(self) -> bool:
        return any(self._pages[i].place in (_Place.CACHED, _Place.STORING) for i in self._recent)

    def _take(self, num_bytes: int) -> Tensor:
        """Returns a free buffer: a new one, or that of the page that was used longest ago."""
        if not self._free and self._num_made >= self._num_buffers:
            self._evict()
        if self._free:
            buffer = self._free.pop()
            if buffer.nbytes >= num_bytes:
                return buffer
            self._num_made -= 1  # it was made when there were only smaller pages
            del buffer
        assert self._device is not None
        self._num_made += 1
        largest = max(held.page.num_bytes for held in self._pages if held.in_place is None)
        return self._store.staging(largest, torch.uint8, self._device)

    def _evict(self) -> None:
        """Frees the buffer of the page that was used longest ago."""
        # Pages that were loaded ahead but not opened come last: they will be needed soon.
        for places in ((_Place.CACHED, _Place.STORING), (_Place.LOADING,)):
            for index in list(self._recent):
                held = self._pages[index]
                if held.place in places:
                    self._settle(held)
                    self._give(index)
                    return
        raise AssertionError("more pages are open than there are buffers")
