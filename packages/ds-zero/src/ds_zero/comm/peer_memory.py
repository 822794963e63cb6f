"""Slices that ranks on one machine copy straight out of each other's memory.

[Note: neighbours]
Two processes of one machine that send each other a slice over TCP have it copied twice, packet by packet, by threads
of the backend that compete with the training for its cores. Linux lets a process copy out of the memory of another
one that it may trace (`process_vm_readv`), which MPI libraries call cross memory attach. So between such ranks nothing
is sent: the sender writes into its board, a page that the others map, where its slice lies; the receiver copies when
it needs the values, and tells the sender that it has. Whoever waits sleeps on a word of the other's board (a futex).
The order of operations, and what ranks that do different things run into, are the same as with messages. Nothing moves
in the background: a slice is copied, at the speed of memory, by the thread that waits for it.

Which pairs of ranks can do this is tried out when they meet: each reads a random number out of the memory of every
other. Other machines, containers that hide each other, systems other than Linux on x86-64, and kernels that refuse
(Yama's `ptrace_scope` above 0) keep to messages.

Source: Vienne, Benefits of Cross Memory Attach for MPI libraries on HPC clusters (XSEDE 2014).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import select
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

_RING = 64
"""Offers from one rank to another that stand on the board at once."""
_SLOT, _HEAD = 3, 8
"""Words of an offer (tag, address of its card, number of tensors), and of what stands before the offers."""
_OFFERED, _TAKEN, _BELL, _ASLEEP, _TOKEN = 0, 1, 2, 3, 4
"""Words of the head: offers made, offers of the other one read, how often anything has changed, how many threads sleep
until the other one changes something, what proves that this is the board."""
_BLOCK = _HEAD + _RING * _SLOT
_MOST_PARTS = 512
"""Tensors copied in one system call; Linux takes 1024."""
_LOOK_S = 0.1
"""How often a rank that waits looks whether the other one still lives."""
_LIMIT_S = 1800.0
"""The longest wait: that of torch's process groups, where nothing else says that ranks stand still."""
_SYS_FUTEX: Mapping[str, int] = {"x86_64": 202}
"""Number of the system call. Only processors that show stores to others in the order in which they were made: an offer
must be complete when it is counted.
"""
_FUTEX_WAIT, _FUTEX_WAKE, _EVERYBODY = 0, 1, 1 << 30


class _Range(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Time(ctypes.Structure):
    """`struct timespec`."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@dataclass(frozen=True)
class _System:
    """What of the system is needed."""

    read: Callable[..., int]
    """process_vm_readv"""
    write: Callable[..., int]
    """process_vm_writev"""
    call: Callable[..., int]
    """syscall"""
    futex: int
    """Its number."""


@functools.cache
def _system() -> _System | None:
    """None where something is missing."""
    number = _SYS_FUTEX.get(os.uname().machine) if hasattr(os, "uname") else None
    if number is None or not hasattr(os, "memfd_create") or not hasattr(os, "pidfd_open"):
        return None
    try:
        library = ctypes.CDLL(None, use_errno=True)
        read, write, call = library.process_vm_readv, library.process_vm_writev, library.syscall
    except (OSError, AttributeError):
        return None
    ranges = (ctypes.c_void_p, ctypes.c_ulong)
    for found in (read, write):
        found.restype = ctypes.c_ssize_t
        found.argtypes = (ctypes.c_int, *ranges, *ranges, ctypes.c_ulong)
    call.restype = ctypes.c_long
    return _System(read, write, call, number)


def copy_from(pid: int, addresses: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """Fill contiguous CPU `tensors` with what lies at `addresses` in process `pid`.

    Raises:
        OSError: the process is gone, may not be read, or has nothing at an address.
    """
    system = _system()
    if system is None:
        raise OSError("this system has no process_vm_readv")
    _move(system.read, pid, _parts(addresses, tensors))


_Part = tuple[int, int, int]
"""Address here, address there, bytes."""
Card = ctypes.Array[ctypes.c_int64]
"""For every tensor of an offer its address and its bytes, then a zero, which the receiver overwrites when it has read
them."""


def _parts(addresses: Sequence[int], tensors: Sequence[Tensor]) -> list[_Part]:
    return [(t.data_ptr(), a, t.nbytes) for t, a in zip(tensors, addresses, strict=True)]


def _move(call: Callable[..., int], pid: int, todo: list[_Part]) -> None:
    """Have the kernel copy between this process and another one."""
    while todo:
        now = todo[:_MOST_PARTS]
        here = (_Range * len(now))(*[_Range(own, length) for own, _, length in now])
        there = (_Range * len(now))(*[_Range(other, length) for _, other, length in now])
        copied = call(pid, here, len(now), there, len(now), 0)
        if copied == sum(length for _, _, length in now):
            todo = todo[_MOST_PARTS:]
            continue
        if copied <= 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        todo = [*_rest(now, copied), *todo[_MOST_PARTS:]]


def _rest(parts: Sequence[_Part], copied: int) -> list[_Part]:
    """What is left after so many bytes: the kernel may stop anywhere."""
    left = []
    for own, other, length in parts:
        done = min(length, copied)
        copied -= done
        if done < length:
            left.append((own + done, other + done, length - done))
    return left


def _new_card(count: int) -> Card:
    return (ctypes.c_int64 * (2 * count + 1))()


_FETCHED = ctypes.c_int64(1)
"""What is written to the end of a card."""


class Alarm:
    """Wakes those of this process who wait for neighbours."""

    def __init__(self) -> None:
        self.raised = False


class _Board:
    """One rank's page: a block of words for each rank of the group. Only its owner writes."""

    def __init__(self, file: int, size: int) -> None:
        self._map = mmap.mmap(file, size * _BLOCK * 8)
        self.words = memoryview(self._map).cast("q")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def wake(self, block: int) -> None:
        """Wake who sleeps on a block's bell."""
        system = _system()
        assert system is not None
        where = self._address + (block * _BLOCK + _BELL) * 8
        system.call(system.futex, ctypes.c_void_p(where), _FUTEX_WAKE, _EVERYBODY, None, None, 0)

    def sleep(self, block: int, heard: int, seconds: float) -> None:
        """Return when the bell has been rung more often than `heard`, or after some time."""
        system = _system()
        assert system is not None
        where = ctypes.c_void_p(self._address + (block * _BLOCK + _BELL) * 8)
        limit = ctypes.byref(_Time(int(seconds), int(seconds % 1 * 1e9)))
        low = ctypes.c_uint32(heard & 0xFFFFFFFF)  # a futex is the low half of the word: x86 is little-endian
        system.call(system.futex, where, _FUTEX_WAIT, low, limit, None, 0)


@dataclass
class _Peer:
    """What this rank knows of another one."""

    rank: int
    pid: int
    board: _Board
    alive: int
    """Its pidfd."""
    taken: int = 0
    """Offers read from its board."""
    open: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    """Offers that were read and not fetched, by tag and number under that tag: (address of the card, number of
    tensors)."""
    found: Counter[int] = field(default_factory=Counter)
    """Tag -> offers read."""
    expected: Counter[int] = field(default_factory=Counter)
    """Tag -> offers that somebody waits for, or has fetched."""
    made: int = 0
    """Offers that this rank's board has shown it."""
    later: deque[tuple[int, int, int]] = field(default_factory=deque)
    """Words of offers that the board has no room for yet."""

    def __del__(self) -> None:
        os.close(self.alive)


class Neighbours:
    """The ranks of one group whose memory this rank can read, and that can read its own.

    An offer on the board points to a `Card` in the sender's memory.
    """

    def __init__(self, rank: int, board: _Board, peers: Sequence[_Peer], alarm: Alarm) -> None:
        self.alarm = alarm
        self._rank, self._board = rank, board
        self._peers = {p.rank: p for p in peers}
        self._lock = threading.Lock()
        self._lent: dict[int, tuple[Card, Sequence[Tensor]]] = {}
        """What others may read: cards, by their addresses, and what they name."""

    def knows(self, rank: int) -> bool:
        return rank in self._peers

    def offer(self, rank: int, tag: int, tensors: Sequence[Tensor]) -> Card:
        """Let `rank` fetch contiguous `tensors`; returns the card. Both stay until `wait_fetched`, whatever the caller
        does.
        """
        peer = self._peers[rank]
        card = _new_card(len(tensors))
        card[:-1] = [w for t in tensors for w in (t.data_ptr(), t.nbytes)]
        address = ctypes.addressof(card)
        with self._lock:
            self._lent[address] = card, tensors
            peer.later.append((tag, address, len(tensors)))
            self._publish(peer)
        return card

    def expect(self, rank: int, tag: int) -> int:
        """The number under this tag of the next offer of `rank` that nobody expects yet."""
        peer = self._peers[rank]
        with self._lock:
            peer.expected[tag] += 1
            return peer.expected[tag] - 1

    def fetch(self, rank: int, tag: int, number: int, tensors: Sequence[Tensor]) -> None:
        """Fill `tensors` with an offer of `rank`, when it comes.

        Raises:
            RuntimeError: the rank has ended, offers something else, or an alarm was raised.
        """
        peer = self._peers[rank]
        self._until(peer, lambda: (tag, number) in peer.open)
        with self._lock:
            address, count = peer.open.pop((tag, number))
        system = _system()
        assert system is not None
        card = _new_card(count)
        try:
            _move(system.read, peer.pid, [(ctypes.addressof(card), address, ctypes.sizeof(card))])
            expected = [t.nbytes for t in tensors]
            if card[1:-1:2] != expected:
                raise RuntimeError(
                    f"rank {rank} of the group offers tensors of {card[1:-1:2]} bytes where tensors of {expected} "
                    "bytes are expected: the ranks run different models or configurations"
                )
            _move(system.read, peer.pid, _parts(card[:-1:2], tensors))
            end = address + ctypes.sizeof(card) - ctypes.sizeof(_FETCHED)
            _move(system.write, peer.pid, [(ctypes.addressof(_FETCHED), end, ctypes.sizeof(_FETCHED))])
        except OSError as error:
            raise RuntimeError(
                f"Connection to rank {rank} of the group is lost: the memory of its process {peer.pid} cannot be read "
                f"({error})"
            ) from error
        with self._lock:
            self._ring_bell(peer)

    def wait_fetched(self, rank: int, card: Card) -> None:
        """Return when `rank` has fetched an offer of this rank, and what was offered may change."""
        self._until(self._peers[rank], lambda: card[-1] != 0)
        with self._lock:
            del self._lent[ctypes.addressof(card)]

    def _ring_bell(self, peer: _Peer) -> None:
        """Something on the board has changed for it; the lock is held.

        It says that it sleeps before it hears the bell for the last time, and here the bell comes before the look at
        whether it sleeps. Should a processor turn these round after all, it wakes by itself a little later.
        """
        self._board.words[peer.rank * _BLOCK + _BELL] += 1
        if peer.board.words[self._rank * _BLOCK + _ASLEEP]:
            self._board.wake(peer.rank)

    def _publish(self, peer: _Peer) -> None:
        """Put what waits on the board, as far as there is room; the lock is held."""
        words, block = self._board.words, peer.rank * _BLOCK
        while peer.later and peer.made - peer.board.words[self._rank * _BLOCK + _TAKEN] < _RING:
            slot = block + _HEAD + peer.made % _RING * _SLOT
            words[slot], words[slot + 1], words[slot + 2] = peer.later.popleft()
            peer.made += 1
            words[block + _OFFERED] = peer.made
            self._ring_bell(peer)

    def _take(self, peer: _Peer) -> None:
        """Read new offers, which makes room for others; the lock is held."""
        words, block = peer.board.words, self._rank * _BLOCK
        before = peer.taken
        while peer.taken < words[block + _OFFERED]:
            slot = block + _HEAD + peer.taken % _RING * _SLOT
            tag, address, count = words[slot : slot + _SLOT].tolist()
            peer.open[tag, peer.found[tag]] = address, count
            peer.found[tag] += 1
            peer.taken += 1
        if peer.taken != before:
            self._board.words[peer.rank * _BLOCK + _TAKEN] = peer.taken

    def _tend(self) -> bool:
        """Move offers from and to the boards; whether some still wait for room."""
        with self._lock:
            for peer in self._peers.values():
                self._take(peer)
                self._publish(peer)
            return any(p.later for p in self._peers.values())

    def _until(self, peer: _Peer, ready: Callable[[], bool]) -> None:
        """Wait for something that the other one does."""
        bell = self._rank * _BLOCK + _BELL
        begun = 0.0
        while True:
            heard = peer.board.words[bell]
            crowded = self._tend()
            if ready():
                return
            if begun:
                self._look_after(peer, begun)
            begun = begun or time.monotonic()
            self._doze(peer, 1)
            # Room on a board appears without a bell that is listened to here.
            peer.board.sleep(self._rank, heard, _LOOK_S / 100 if crowded else _LOOK_S)
            self._doze(peer, -1)

    def _doze(self, peer: _Peer, by: int) -> None:
        with self._lock:
            self._board.words[peer.rank * _BLOCK + _ASLEEP] += by

    def _look_after(self, peer: _Peer, begun: float) -> None:
        if self.alarm.raised:
            raise RuntimeError(f"Connection closed while waiting for rank {peer.rank} of the group")
        if time.monotonic() - begun > _LIMIT_S:
            raise RuntimeError(f"Timed out waiting {_LIMIT_S:.0f} s for rank {peer.rank} of the group")
        if _has_ended(peer.alive):
            raise RuntimeError(
                f"Connection to rank {peer.rank} of the group is lost: its process {peer.pid} has ended"
            )


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()  # select.select takes no descriptor above 1023
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


class Exchange:
    """What one rank exchanges with its neighbours in one operation; a work."""

    def __init__(self, neighbours: Neighbours, tag: int) -> None:
        self._neighbours, self._tag = neighbours, tag
        self._coming: list[tuple[int, int, Sequence[Tensor]]] = []
        self._going: list[tuple[int, Card]] = []

    def reaches(self, rank: int) -> bool:
        """Whether nothing needs to be sent to or from `rank`."""
        return self._neighbours.knows(rank)

    def receive(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Expect `tensors` from `rank`."""
        if tensors:
            self._coming.append((rank, self._neighbours.expect(rank, self._tag), tensors))

    def send(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Let `rank` fetch `tensors`, which must not change until the work is over."""
        if tensors:
            self._going.append((rank, self._neighbours.offer(rank, self._tag, tensors)))

    def arrive(self) -> None:
        """Fetch what comes."""
        while self._coming:
            rank, number, tensors = self._coming.pop(0)
            self._neighbours.fetch(rank, self._tag, number, tensors)

    def settle(self) -> None:
        """Return when others have fetched what went."""
        while self._going:
            rank, card = self._going.pop(0)
            self._neighbours.wait_fetched(rank, card)

    def wait(self) -> None:
        self.arrive()
        self.settle()


def meet(group: dist.ProcessGroup, device: torch.device, alarm: Alarm) -> Neighbours | None:
    """Find out which ranks of `group` are neighbours. Collective; None where there are none."""
    if device.type != "cpu" or "gloo" not in _backend(group):
        return None
    rank, size = group.rank(), group.size()
    token = torch.tensor([int.from_bytes(os.urandom(7), "big")])
    file, board = _new_board(size, int(token)) if _system() is not None else (-1, None)
    mine = torch.tensor([os.getpid(), token.data_ptr(), int(token), file])
    cards = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(cards, mine, group=group)
    found = [_try(r, card.tolist(), size) if r != rank else None for r, card in enumerate(cards)]
    read = torch.tensor([p is not None for p in found])
    table = [torch.empty_like(read) for _ in range(size)]
    dist.all_gather(table, read, group=group)
    # All have read: what they read may go.
    if file >= 0:
        os.close(file)
    peers = [p for r, p in enumerate(found) if p is not None and table[r][rank]]
    return Neighbours(rank, board, peers, alarm) if board is not None and peers else None


def _new_board(size: int, token: int) -> tuple[int, _Board]:
    file = os.memfd_create("ds_zero")
    os.ftruncate(file, size * _BLOCK * 8)
    board = _Board(file, size)
    board.words[_TOKEN] = token
    return file, board


def _try(rank: int, card: Sequence[int], size: int) -> _Peer | None:
    """The rank whose card it is, if its memory and its board can be read."""
    pid, address, token, file = card
    seen = torch.zeros(1, dtype=torch.int64)
    try:
        copy_from(pid, [address], [seen])
        if int(seen) != token:
            return None  # a process of another machine has that number there
        opened = os.open(f"/proc/{pid}/fd/{file}", os.O_RDWR)
        try:
            board = _Board(opened, size)
        finally:
            os.close(opened)
        return _Peer(rank, pid, board, os.pidfd_open(pid)) if board.words[_TOKEN] == token else None
    except (OSError, ValueError):
        return None


def _backend(group: dist.ProcessGroup) -> str:
    try:
        return str(dist.get_backend(group))
    except ValueError:  # a stand-in that torch does not know
        return ""
