"""Ranks of one machine copy out of each other's memory: same bits, no messages, and errors that say who is gone."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_comm
import ds_zero
from ds_comm.same_host import peer_memory
from ds_comm.same_host.peer_memory import Exchange, PeerMemory, connect
from ds_comm.same_host.system_calls import copy_from, system_calls
from ds_zero import _registry
from ds_zero.comm.abort import AbortFlag
from ds_zero.comm.collectives import default_comm
from ds_zero.comm.ranks import ranks_of, with_transport
from harness import ranks
from zero.models import Tiny, batch
from zero.parity import everywhere

CPU = torch.device("cpu")
REDUCE, GATHER = 0x6A, 0x1000


def readable() -> bool:
    """Whether this system lets a process read another one's memory."""
    with closing(_pipe()) as other:
        there = torch.zeros(1)
        try:
            copy_from(other.process.pid, [there.data_ptr()], [there])
        except OSError as error:
            return error.errno == 14  # EFAULT: it may, and there is nothing at that address
    return True


class _pipe:
    """A process that lives until it is closed."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


pytestmark = pytest.mark.skipif(
    not readable(), reason="this system does not let ranks read each other's memory"
)


def pair(pid_of_1: int | None = None) -> tuple[PeerMemory, PeerMemory]:
    """Two ranks, both in this process unless the second is said to be elsewhere."""
    files, mailboxes = zip(*(peer_memory._new_mailbox(2, 0) for _ in range(2)), strict=True)
    for file in files:
        os.close(file)
    pids = os.getpid(), pid_of_1 or os.getpid()
    found = []
    for rank, other in ((0, 1), (1, 0)):
        peer = peer_memory._Peer(other, pids[other], mailboxes[other], os.pidfd_open(pids[other]))
        found.append(PeerMemory(rank, mailboxes[rank], [peer], AbortFlag()))
    return found[0], found[1]


def send(origin: PeerMemory, to: int, tag: int, *values: float) -> Exchange:
    exchange = Exchange(origin, tag)
    exchange.send(to, [torch.tensor([v]) for v in values])
    return exchange


def receive(own: PeerMemory, origin: int, tag: int, *tensors: Tensor) -> Exchange:
    exchange = Exchange(own, tag)
    exchange.receive(origin, tensors)
    return exchange


def fetch(own: PeerMemory, origin: int, tag: int) -> float:
    got = torch.zeros(1)
    receive(own, origin, tag, got).wait()
    return float(got)


def test_what_is_offered_arrives() -> None:
    first, second = pair()
    going = send(first, 1, REDUCE, 1.0, 2.0)
    got = [torch.zeros(1), torch.zeros(1)]
    receive(second, 0, REDUCE, *got).wait()
    going.wait()
    assert [float(t) for t in got] == [1.0, 2.0]


def test_tags_are_fetched_in_any_order() -> None:
    first, second = pair()
    sent = [send(first, 1, GATHER + n, float(n)) for n in range(5)]
    assert [fetch(second, 0, GATHER + n) for n in (3, 0, 4, 2, 1)] == [3, 0, 4, 2, 1]
    for exchange in reversed(sent):
        exchange.wait()


def test_under_one_tag_the_order_of_starting_counts() -> None:
    first, second = pair()
    for n in (1, 2):
        send(first, 1, REDUCE, float(n))
    got = [torch.zeros(1), torch.zeros(1)]
    started = [receive(second, 0, REDUCE, t) for t in got]
    for exchange in reversed(started):
        exchange.wait()
    assert [float(t) for t in got] == [1, 2]


def test_an_offer_that_nobody_fetches_holds_up_no_other() -> None:
    first, second = pair()
    unused = send(first, 1, GATHER, 1.0)
    for n in range(1, 2 * peer_memory._RING):
        wanted = send(first, 1, GATHER + n, 2.0)
        fetch(second, 0, GATHER + n)
        wanted.wait()
    fetch(second, 0, GATHER)
    unused.wait()


def test_more_offers_than_the_board_has_room_for() -> None:
    first, second = pair()
    sent = [send(first, 1, GATHER + n, float(n)) for n in range(3 * peer_memory._RING)]
    box: list[float] = []
    reader = threading.Thread(
        target=lambda: box.extend(fetch(second, 0, GATHER + n) for n in range(len(sent)))
    )
    reader.start()
    for exchange in sent:
        exchange.wait()
    reader.join()
    assert box == [float(n) for n in range(len(sent))]


def test_the_sender_waits_until_its_memory_was_read() -> None:
    first, second = pair()
    going = send(first, 1, REDUCE, 7.0)
    over = threading.Event()
    waiter = threading.Thread(target=lambda: (going.wait(), over.set()))
    waiter.start()
    assert not over.wait(0.3)
    assert fetch(second, 0, REDUCE) == 7.0
    waiter.join()
    assert over.is_set()


def test_different_sizes_are_refused() -> None:
    first, second = pair()
    going = send(first, 1, REDUCE, 1.0)
    with pytest.raises(RuntimeError, match=r"rank 0 .* of \[4\] bytes where tensors of \[8\] bytes"):
        receive(second, 0, REDUCE, torch.zeros(2)).wait()
    del going


def test_a_rank_that_has_ended_is_named() -> None:
    other = _pipe()
    first, _ = pair(other.process.pid)
    other.close()
    with pytest.raises(RuntimeError, match=rf"rank 1 .* process {other.process.pid} has ended"):
        fetch(first, 1, REDUCE)


def test_an_abort_ends_a_wait() -> None:
    first, _ = pair()
    threading.Timer(0.2, first.abort.set).start()
    with pytest.raises(RuntimeError, match="closed while waiting for rank 1"):
        fetch(first, 1, REDUCE)


def test_a_rank_that_leaves_ends_the_waits_of_others_for_it() -> None:
    first, second = pair()
    threading.Timer(0.2, second.abort.set).start()
    with pytest.raises(RuntimeError, match="closed by rank 1"):
        fetch(first, 1, REDUCE)


def test_what_was_offered_before_leaving_arrives() -> None:
    first, second = pair()
    going = send(second, 0, REDUCE, 3.0)
    second.abort.set()
    assert fetch(first, 1, REDUCE) == 3.0
    del going


def test_many_parts_are_copied() -> None:
    source = torch.arange(1500.0)
    got = [torch.zeros(1) for _ in range(1500)]
    copy_from(os.getpid(), [source.data_ptr() + 4 * i for i in range(1500)], got)
    assert torch.equal(torch.cat(got), source)


def test_an_address_without_memory_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad address"):
        copy_from(os.getpid(), [8], [torch.zeros(1)])


# --- training


def train(stage: int, comm: ds_comm.Collectives | None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Tiny(dim=48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = ds_zero.ZeroConfig(reduce_bucket_numel=4000)
    ds_zero.shard(model, optimizer, stage, config=config, comm=comm)
    for step in range(3):
        model(*batch(step, dist.get_rank())).backward()
        ds_zero.clip_grad_norm_(model, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return everywhere(ds_zero.full_state_dict(model))


@ranks(2, 3)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_same_bits_as_with_messages(stage: int) -> None:
    found, expected = train(stage, ds_comm.collectives()), train(stage, None)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@ranks(2)
def test_nothing_is_sent_where_peer_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = ds_zero.ZeroConfig(persistence_threshold_numel=0)
    ds_zero.shard(model, optimizer, 3, config=config, comm=ds_comm.collectives())
    comm = _registry.state_of(model).comm
    sent = []
    monkeypatch.setattr(
        dist.ProcessGroup, "send", lambda self, tensors, to, tag: sent.append(tensors), raising=True
    )
    before = comm.gathered_bytes + comm.reduced_bytes
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    assert comm.gathered_bytes + comm.reduced_bytes > before  # what had to move is counted all the same
    assert not sent


@ranks(2)
def test_one_side_without_permission_is_enough_for_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    if dist.get_rank() == 1:
        monkeypatch.setattr(peer_memory, "system_calls", lambda: None)
    known = with_transport(ranks_of(None), CPU, connect, AbortFlag())
    assert known.transport is None
    whole = torch.zeros(2)
    whole[dist.get_rank()] = 1.0 + dist.get_rank()
    default_comm(CPU).gather(whole, known).wait()
    assert whole.tolist() == [1.0, 2.0]


@ranks(2)
@pytest.mark.parametrize("refused", ["process_vm_writev", "memfd_create"])
def test_a_call_refused_on_one_rank_leaves_all_with_messages(
    refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under a seccomp filter that refuses one of the calls and allows the others."""
    if dist.get_rank() == 1 and refused == "memfd_create":

        def refuse(name: str) -> int:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "memfd_create", refuse)
    elif dist.get_rank() == 1:
        system = system_calls()
        assert system is not None
        denied = replace(system, write=lambda *args: (ctypes.set_errno(1), -1)[1])
        monkeypatch.setattr(peer_memory, "system_calls", lambda: denied)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = ds_zero.ZeroConfig(persistence_threshold_numel=0)
    ds_zero.shard(model, optimizer, 3, config=config, comm=ds_comm.collectives())
    assert _registry.state_of(model).ranks.transport is None
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()


def test_a_process_that_ends_while_it_is_read_is_not_taken_for_another_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its process id may belong to somebody else by then, whose memory can be read just as well."""
    first, second = pair()
    send(first, 1, REDUCE, 1.0)
    monkeypatch.setattr(peer_memory, "_has_ended", lambda pidfd: True)
    with pytest.raises(RuntimeError, match=r"rank 0 .*the process has ended"):
        fetch(second, 0, REDUCE)
