"""Ranks on one machine copy slices directly from each other's memory.

[Note: peer memory]
When two processes of one machine send each other a slice over TCP, threads of the backend copy it twice, packet by
packet, and compete with the training for its cores. Linux lets a process read the memory of another process that it
may trace (`process_vm_readv`); MPI libraries call this cross-memory attach. Between such ranks nothing is sent. Each
rank owns a mailbox: shared memory with a ring of descriptors for every other rank. The sender posts a descriptor with
the address of its slice. The receiver copies the slice when it needs the values, then marks the descriptor as fetched.
A waiting rank sleeps on the doorbell, a word of the other rank's mailbox (a futex). Operations with the same tag are
matched in order, as messages would be, so ranks that run different operations get the same errors. Nothing is copied in
the background: the thread that waits for a slice copies it, at memory speed.

`connect` finds out which pairs of ranks can do this: each rank reads a random number from the memory of every other
rank, writes one there, and opens its mailbox. A pair in which either side fails sends messages. That is the case
between machines, between containers that hide their processes, on systems other than Linux on x86-64, and where the
kernel refuses (Yama's `ptrace_scope` above 0, seccomp).

Source: Vienne, Benefits of Cross Memory Attach for MPI libraries on HPC clusters (XSEDE 2014).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.interfaces import Abort
from ds_comm.same_host.system_calls import copy_from, copy_parts, parts_of, system_calls

_RING = 64
"""Maximum number of descriptors from one rank to another in its mailbox."""
_SLOT, _HEAD = 3, 8
"""Words of a ring entry (tag, address of the descriptor, number of tensors), and of the head of a block."""
_OFFERED, _TAKEN, _DOORBELL, _WAITERS, _TOKEN, _LEFT = 0, 1, 2, 3, 4, 5
"""Words of the head: entries posted, entries of the other rank read, how often anything has changed, how many threads
sleep until the other rank changes something, the random number that identifies the mailbox, and whether the owner of
the mailbox has left the group."""
_BLOCK = _HEAD + _RING * _SLOT
_POLL_S = 0.1
"""Seconds between two checks of a waiting rank that the other rank is alive."""
_LIMIT_S = 1800.0
"""Maximum wait in seconds, as in torch's process groups; the detection of stalled ranks usually ends it earlier."""


Descriptor = ctypes.Array[ctypes.c_int64]
"""The address and the bytes of every tensor, then a zero that the receiver overwrites when it has read them."""


def _new_descriptor(count: int) -> Descriptor:
    return (ctypes.c_int64 * (2 * count + 1))()


_FETCHED = ctypes.c_int64(1)
"""Written to the end of a descriptor."""


class _Mailbox:
    """The shared page of one rank: a block of words for each rank of the group. Only its owner writes."""

    def __init__(self, file: int, size: int) -> None:
        self._map = mmap.mmap(file, size * _BLOCK * 8)
        self.words = memoryview(self._map).cast("q")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def wake(self, block: int) -> None:
        """Wakes the threads that sleep on the doorbell of a block."""
        system = system_calls()
        assert system is not None
        system.wake(self._address + (block * _BLOCK + _DOORBELL) * 8)

    def sleep(self, block: int, heard: int, seconds: float) -> None:
        """Returns once the doorbell has been rung more than `heard` times, or after `seconds`."""
        system = system_calls()
        assert system is not None
        system.sleep(self._address + (block * _BLOCK + _DOORBELL) * 8, heard, seconds)


@dataclass
class _Peer:
    """Another rank whose memory this rank can read."""

    rank: int
    pid: int
    mailbox: _Mailbox
    alive: int
    """The peer's pidfd, which becomes readable when its process ends."""
    taken: int = 0
    """Number of entries read from its mailbox."""
    open: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    """Entries that were read from its mailbox, but not fetched: (tag, number of the entry with that tag) -> (address of
    the descriptor, number of tensors)."""
    received: Counter[int] = field(default_factory=Counter)
    """Tag -> number of entries read."""
    expected: Counter[int] = field(default_factory=Counter)
    """Tag -> number of entries that this rank waits for or has fetched."""
    made: int = 0
    """Number of entries that this rank has posted for the peer."""
    later: deque[tuple[int, int, int]] = field(default_factory=deque)
    """Entries for the peer that will be posted when the ring has room."""

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.alive)  # at the end of the interpreter `os` is None already


class PeerMemory:
    """The ranks of one group that can read this rank's memory, and whose memory this rank can read."""

    def __init__(self, rank: int, mailbox: _Mailbox, peers: Sequence[_Peer], abort: Abort) -> None:
        self.abort = abort
        self._rank, self._mailbox = rank, mailbox
        self._peers = {p.rank: p for p in peers}
        self._lock = threading.Lock()
        self._lent: dict[int, tuple[Descriptor, Sequence[Tensor]]] = {}
        """Address -> descriptor, and its tensors, which are kept alive while the peer may read them."""
        abort.add(self)

    def exchange(self, tag: int) -> Exchange:
        """Returns an operation that sends and receives with message tag `tag`."""
        return Exchange(self, tag)

    def knows(self, rank: int) -> bool:
        """Whether `rank` is one of the peers."""
        return rank in self._peers

    def offer(self, rank: int, tag: int, tensors: Sequence[Tensor]) -> Descriptor:
        """Offers contiguous `tensors` to `rank`. Descriptor and tensors are kept alive until `wait_fetched`."""
        peer = self._peers[rank]
        descriptor = _new_descriptor(len(tensors))
        descriptor[:-1] = [w for t in tensors for w in (t.data_ptr(), t.nbytes)]
        address = ctypes.addressof(descriptor)
        with self._lock:
            self._lent[address] = descriptor, tensors
            peer.later.append((tag, address, len(tensors)))
            self._publish(peer)
        return descriptor

    def expect(self, rank: int, tag: int) -> int:
        """Expects one more entry of `rank` with this tag. Returns its number, to be passed to `fetch`."""
        peer = self._peers[rank]
        with self._lock:
            peer.expected[tag] += 1
            return peer.expected[tag] - 1

    def fetch(self, rank: int, tag: int, number: int, tensors: Sequence[Tensor]) -> None:
        """Waits for an entry of `rank`, and copies its tensors into `tensors`.

        Raises:
            RuntimeError: the rank has ended or offers tensors of other sizes, or the wait was aborted.
        """
        peer = self._peers[rank]
        self._until(peer, lambda: (tag, number) in peer.open)
        with self._lock:
            address, count = peer.open.pop((tag, number))
        system = system_calls()
        assert system is not None
        descriptor = _new_descriptor(count)
        try:
            copy_parts(
                system.read, peer.pid, [(ctypes.addressof(descriptor), address, ctypes.sizeof(descriptor))]
            )
            expected = [t.nbytes for t in tensors]
            if descriptor[1:-1:2] != expected:
                raise RuntimeError(
                    f"rank {rank} of the group offers tensors of {descriptor[1:-1:2]} bytes where tensors of "
                    f"{expected} bytes are expected: the ranks run different models or configurations"
                )
            copy_parts(system.read, peer.pid, parts_of(descriptor[:-1:2], tensors))
            end = address + ctypes.sizeof(descriptor) - ctypes.sizeof(_FETCHED)
            copy_parts(system.write, peer.pid, [(ctypes.addressof(_FETCHED), end, ctypes.sizeof(_FETCHED))])
            if _has_ended(peer.alive):  # its process id may belong to another process now
                raise OSError("the process has ended")
        except OSError as error:
            raise RuntimeError(
                f"Connection to rank {rank} of the group is lost: the memory of its process {peer.pid} cannot be read "
                f"({error})"
            ) from error
        with self._lock:
            self._ring_doorbell(peer)

    def wait_fetched(self, rank: int, descriptor: Descriptor) -> None:
        """Returns once `rank` has fetched the tensors of the descriptor, which may be changed afterwards."""
        self._until(self._peers[rank], lambda: descriptor[-1] != 0)
        with self._lock:
            del self._lent[ctypes.addressof(descriptor)]

    def leave(self) -> None:
        """Ends the waits of all peers for this rank, which will neither offer nor fetch any more."""
        with self._lock:
            for peer in self._peers.values():
                self._mailbox.words[peer.rank * _BLOCK + _LEFT] = 1
                self._ring_doorbell(peer)

    def _ring_doorbell(self, peer: _Peer) -> None:
        """Tells the peer that its block has changed. The caller holds the lock.

        A peer increases the number of waiters before it reads the doorbell for the last time, and here the doorbell is
        changed before the number of waiters is read. So one of the two sees the other's change. If a processor reorders
        the two accesses nevertheless, the peer's sleep times out.
        """
        self._mailbox.words[peer.rank * _BLOCK + _DOORBELL] += 1
        if peer.mailbox.words[self._rank * _BLOCK + _WAITERS]:
            self._mailbox.wake(peer.rank)

    def _publish(self, peer: _Peer) -> None:
        """Posts entries as long as the ring has room. The caller holds the lock."""
        words, block = self._mailbox.words, peer.rank * _BLOCK
        while peer.later and peer.made - peer.mailbox.words[self._rank * _BLOCK + _TAKEN] < _RING:
            slot = block + _HEAD + peer.made % _RING * _SLOT
            words[slot], words[slot + 1], words[slot + 2] = peer.later.popleft()
            peer.made += 1
            words[block + _OFFERED] = peer.made
            self._ring_doorbell(peer)

    def _take(self, peer: _Peer) -> None:
        """Reads new entries, which frees room in the ring. The caller holds the lock."""
        words, block = peer.mailbox.words, self._rank * _BLOCK
        before = peer.taken
        while peer.taken < words[block + _OFFERED]:
            slot = block + _HEAD + peer.taken % _RING * _SLOT
            tag, address, count = words[slot : slot + _SLOT].tolist()
            peer.open[tag, peer.received[tag]] = address, count
            peer.received[tag] += 1
            peer.taken += 1
        if peer.taken != before:
            self._mailbox.words[peer.rank * _BLOCK + _TAKEN] = peer.taken

    def _progress(self) -> bool:
        """Reads and posts entries of all peers. Returns whether entries remain for which a ring has no room."""
        with self._lock:
            for peer in self._peers.values():
                self._take(peer)
                self._publish(peer)
            return any(p.later for p in self._peers.values())

    def _until(self, peer: _Peer, ready: Callable[[], bool]) -> None:
        """Waits until `ready` returns true, which depends on entries or marks that the peer writes."""
        bell = self._rank * _BLOCK + _DOORBELL
        begun = 0.0
        while True:
            heard = peer.mailbox.words[bell]
            ring_is_full = self._progress()
            if ready():
                return
            if begun:
                self._check_alive(peer, begun)
            begun = begun or time.monotonic()
            self._count_waiter(peer, 1)
            # This thread sleeps on the doorbell of one peer only, so it polls for room in the rings of other peers.
            peer.mailbox.sleep(self._rank, heard, _POLL_S / 100 if ring_is_full else _POLL_S)
            self._count_waiter(peer, -1)

    def _count_waiter(self, peer: _Peer, by: int) -> None:
        with self._lock:
            self._mailbox.words[peer.rank * _BLOCK + _WAITERS] += by

    def _check_alive(self, peer: _Peer, begun: float) -> None:
        if self.abort.raised:
            raise RuntimeError(f"Connection closed while waiting for rank {peer.rank} of the group")
        if peer.mailbox.words[self._rank * _BLOCK + _LEFT]:
            raise RuntimeError(f"Connection closed by rank {peer.rank} of the group")
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
    """The tensors that one rank exchanges with its peers in one operation, which is waited for like a `dist.Work`."""

    def __init__(self, peer_memory: PeerMemory, tag: int) -> None:
        self._peer_memory, self._tag = peer_memory, tag
        self._incoming: list[tuple[int, int, Sequence[Tensor]]] = []
        self._outgoing: list[tuple[int, Descriptor]] = []

    def reaches(self, rank: int) -> bool:
        """Whether tensors to and from `rank` are exchanged without messages."""
        return self._peer_memory.knows(rank)

    def receive(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Expects `tensors` from `rank`; `wait_received` fills them."""
        if tensors:
            self._incoming.append((rank, self._peer_memory.expect(rank, self._tag), tensors))

    def send(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Offers `tensors` to `rank`. They must not change before `wait_sent` returns."""
        if tensors:
            self._outgoing.append((rank, self._peer_memory.offer(rank, self._tag, tensors)))

    def wait_received(self) -> None:
        """Fetches all expected tensors."""
        while self._incoming:
            rank, number, tensors = self._incoming.pop(0)
            self._peer_memory.fetch(rank, self._tag, number, tensors)

    def wait_sent(self) -> None:
        """Returns once the peers have fetched all offered tensors."""
        while self._outgoing:
            rank, descriptor = self._outgoing.pop(0)
            self._peer_memory.wait_fetched(rank, descriptor)

    def wait(self) -> None:
        self.wait_received()
        self.wait_sent()


def connect(group: dist.ProcessGroup, device: torch.device, abort: Abort) -> PeerMemory | None:
    """Finds out which ranks of `group` can read and write each other's memory. Returns None if this rank has no such
    peer. Collective.

    If the system refuses access, no rank raises; messages are used instead.
    """
    if device.type != "cpu" or "gloo" not in _backend(group):
        return None
    rank, size = group.rank(), group.size()
    token = torch.tensor([int.from_bytes(os.urandom(7), "big")])
    scratch = torch.zeros(size, dtype=torch.int64)
    file, mailbox = _new_mailbox(size, int(token))
    mine = torch.tensor([os.getpid(), token.data_ptr(), int(token), scratch.data_ptr(), file])
    contacts = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(contacts, mine, group=group)
    peers = [None if r == rank else _try(r, c.tolist(), size, rank) for r, c in enumerate(contacts)]
    reached = torch.tensor([peer is not None for peer in peers])
    table = [torch.empty_like(reached) for _ in range(size)]
    dist.all_gather(table, reached, group=group)
    # Every rank has opened the mailboxes that it can open, so the file descriptor is no longer needed.
    if file >= 0:
        os.close(file)
    mutual = [peer for r, peer in enumerate(peers) if peer is not None and table[r][rank]]
    return PeerMemory(rank, mailbox, mutual, abort) if mailbox is not None and mutual else None


def _new_mailbox(size: int, token: int) -> tuple[int, _Mailbox | None]:
    """Returns a file descriptor and the mailbox mapped from it; -1 and None if the system does not support or permit
    it.
    """
    if system_calls() is None:
        return -1, None
    try:
        file = os.memfd_create("ds_comm")
    except OSError:  # seccomp, gVisor, vm.memfd_noexec=2
        return -1, None
    try:
        os.ftruncate(file, size * _BLOCK * 8)
        mailbox = _Mailbox(file, size)
    except (OSError, ValueError):
        os.close(file)
        return -1, None
    mailbox.words[_TOKEN] = token
    return file, mailbox


def _try(rank: int, contact: Sequence[int], size: int, own: int) -> _Peer | None:
    """Returns the peer `rank` if rank `own` can read and write its memory and open its mailbox."""
    pid, address, token, scratch, file = contact
    system = system_calls()
    if system is None or file < 0:
        return None
    seen = torch.zeros(1, dtype=torch.int64)
    try:
        copy_from(pid, [address], [seen])
        if int(seen) != token:
            return None  # the process id belongs to another machine
        # Reading may be permitted without writing, but fetched entries are marked by a write.
        copy_parts(system.write, pid, [(seen.data_ptr(), scratch + own * seen.nbytes, seen.nbytes)])
        opened = os.open(f"/proc/{pid}/fd/{file}", os.O_RDWR)
        try:
            mailbox = _Mailbox(opened, size)
        finally:
            os.close(opened)
        return _Peer(rank, pid, mailbox, os.pidfd_open(pid)) if mailbox.words[_TOKEN] == token else None
    except (OSError, ValueError):
        return None


def _backend(group: dist.ProcessGroup) -> str:
    try:
        return str(dist.get_backend(group))
    except ValueError:  # a simulated group that torch does not know
        return ""
