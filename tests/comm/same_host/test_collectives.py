"""Collectives through shared memory: right values, the same bits on every rank, and errors that name who is gone."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.same_host import collectives
from ds_comm.same_host.collectives import SameHostGroup, connect_group
from ds_core import same_host
from ds_core.same_host import SameHostError
from harness import ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64]
SIZES = [0, 1, 1000, 16_385, 300_001]
"""In elements: none, through the segment, and through the memory of the other process, in one and several chunks."""


def connected() -> SameHostGroup:
    group = connect_group(limit_s=60.0)
    if group is None:
        pytest.skip("this system does not let ranks read each other's memory")
    return group


def inputs(numel: int, dtype: torch.dtype) -> list[Tensor]:
    """The tensors of all ranks."""
    draw = torch.Generator().manual_seed(numel)
    return [(torch.randn(numel, generator=draw) * 100).to(dtype) for _ in range(dist.get_world_size())]


def tree_sum(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        narrow = parts[0].dtype in (torch.bfloat16, torch.float16)
        return parts[0].float() if narrow else parts[0]
    middle = 1 << ((len(parts) - 1).bit_length() - 1)
    return tree_sum(parts[:middle]) + tree_sum(parts[middle:])


@ranks(2, 3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions_are_sums_in_the_order_of_a_tree(dtype: torch.dtype) -> None:
    group, rank, size = connected(), dist.get_rank(), dist.get_world_size()
    for numel in SIZES:
        all_inputs = inputs(numel * size, dtype)
        expected = tree_sum(all_inputs)
        reduced = all_inputs[rank].clone()
        group.all_reduce(reduced)
        assert torch.equal(reduced, expected.to(dtype))
        own = torch.empty(numel, dtype=dtype)
        group.reduce_scatter(own, all_inputs[rank])
        assert torch.equal(own, expected[rank * numel : (rank + 1) * numel].to(dtype))
        if dtype.is_floating_point:
            group.reduce_scatter(own, all_inputs[rank], "mean")
            mean = expected * torch.tensor(1 / size, dtype=expected.dtype)
            assert torch.equal(own, mean[rank * numel : (rank + 1) * numel].to(dtype))
    group.close()


@ranks(3)
def test_maximum_and_minimum() -> None:
    group, rank = connected(), dist.get_rank()
    for numel in SIZES:
        all_inputs = inputs(numel, torch.float32)
        for op, reduce in (("max", torch.maximum), ("min", torch.minimum)):
            found = all_inputs[rank].clone()
            group.all_reduce(found, op)  # type: ignore[arg-type]
            assert torch.equal(found, reduce(reduce(all_inputs[0], all_inputs[1]), all_inputs[2]))
    group.close()


@ranks(2, 3)
def test_tensors_are_moved() -> None:
    group, rank, size = connected(), dist.get_rank(), dist.get_world_size()
    for numel in SIZES:
        all_inputs = inputs(numel, torch.bfloat16)
        whole = torch.cat(all_inputs)
        gathered = torch.empty_like(whole)
        group.all_gather(gathered, all_inputs[rank])
        assert torch.equal(gathered, whole)
        in_place = torch.zeros_like(whole)
        part = in_place[rank * numel : (rank + 1) * numel]
        part.copy_(all_inputs[rank])
        group.all_gather(in_place, part)
        assert torch.equal(in_place, whole)
        for source in range(size):
            received = all_inputs[rank].clone()
            group.broadcast(received, source)
            assert torch.equal(received, all_inputs[source])
    group.close()


@ranks(3)
def test_sizes_may_differ() -> None:
    group, rank, size = connected(), dist.get_rank(), dist.get_world_size()
    for unit in (1, 20_000):
        sizes = [unit * r for r in range(size)]  # rank 0 has nothing
        parts = [torch.arange(n, dtype=torch.float32) + 7 * r for r, n in enumerate(sizes)]
        gathered = torch.empty(sum(sizes))
        group.all_gather(gathered, parts[rank], sizes)
        assert torch.equal(gathered, torch.cat(parts))

        sent = [unit * (rank + other) for other in range(size)]  # rank r sends r + p units to rank p
        source = torch.cat([torch.full((n,), 10.0 * rank + p) for p, n in enumerate(sent)])
        found = torch.empty(sum(sent))
        group.all_to_all(found, source, sent, sent)  # the table is symmetric
        assert torch.equal(found, torch.cat([torch.full((n,), 10.0 * p + rank) for p, n in enumerate(sent)]))
    group.close()


@ranks(2)
def test_asynchronous_calls_run_in_their_order() -> None:
    group, rank = connected(), dist.get_rank()
    large, small = torch.full((500_000,), 1.0 + rank), torch.full((3,), 1.0)
    first = group.all_reduce(large, async_op=True)
    second = group.all_reduce(small, async_op=True)
    third = group.broadcast(torch.zeros(1), async_op=True)
    assert first is not None and second is not None and third is not None
    for work in (second, first, third) if rank == 0 else (third, first, second):  # waited for in any order
        work.wait()
    assert first.is_completed()
    assert large.eq(3.0).all()
    assert small.tolist() == [2.0, 2.0, 2.0]
    group.all_reduce(small)
    assert small.tolist() == [4.0, 4.0, 4.0]
    group.close()


@ranks(2)
def test_ranks_that_make_different_calls_are_told_so() -> None:
    group, rank = connected(), dist.get_rank()
    with pytest.raises(SameHostError, match="the ranks run different programs") as raised:
        group.all_reduce(torch.zeros(4 if rank == 0 else 5))
    assert f"all_reduce (sum) of {20 if rank == 0 else 16} bytes of float32" in str(raised.value)
    assert raised.value.rank == 1 - rank
    with pytest.raises(SameHostError):  # it stays broken
        group.barrier()
    group.close()


@ranks(2)
def test_a_rank_that_leaves_ends_the_wait_of_the_other() -> None:
    group = connected()
    if dist.get_rank() == 0:
        with pytest.raises(SameHostError, match="rank 1 of the team has left it"):
            group.barrier()
    group.close()


@ranks(2)
def test_a_rank_that_does_not_come_is_named() -> None:
    group = connect_group(limit_s=0.2)
    if group is None:
        pytest.skip("this system does not let ranks read each other's memory")
    if dist.get_rank() == 0:
        with pytest.raises(SameHostError, match=r"rank 1 has not come within 0\.2 s"):
            group.barrier()
    dist.barrier()
    group.close()


@ranks(2)
@pytest.mark.parametrize("refused", ["new_segment", "reaches", "Team"])
def test_a_system_that_refuses_on_one_rank_has_no_group_on_any(
    refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected().close()  # otherwise this test would show nothing

    def refuse(*_: object) -> bool:
        if refused == "reaches":
            return False
        raise PermissionError(1, "Operation not permitted")

    if dist.get_rank() == (0 if refused == "new_segment" else 1):
        monkeypatch.setattr(collectives.same_host, refused, refuse)
    assert connect_group() is None


@ranks(2)
def test_wrong_arguments_are_refused_before_anything_is_sent() -> None:
    group = connected()
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: group.all_reduce(torch.zeros(2, dtype=torch.bool)), "bool cannot be reduced"),
        (
            lambda: group.all_reduce(torch.zeros(2, dtype=torch.int32), "mean"),
            "needs a floating-point tensor",
        ),
        (lambda: group.all_reduce(torch.zeros(2), "product"), "op is one of"),  # type: ignore[arg-type]
        (lambda: group.all_reduce(torch.zeros(4, 4).t()[1:]), "contiguous"),
        (lambda: group.reduce_scatter(torch.zeros(2), torch.zeros(3)), "12 bytes, but 16 are needed"),
        (lambda: group.reduce_scatter(torch.zeros(2), torch.zeros(4).half()), "output is torch.float32"),
        (lambda: group.all_gather(torch.zeros(3), torch.zeros(2)), "12 bytes, but 16 are needed"),
        (lambda: group.all_to_all(torch.zeros(3), torch.zeros(3)), "cannot be divided evenly"),
        (lambda: group.broadcast(torch.zeros(3), 2), "no such rank"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    value = torch.ones(1)
    group.all_reduce(value)  # nothing is broken
    assert value.item() == 2.0
    group.close()


def test_an_error_crosses_processes() -> None:
    error = SameHostError("rank 1 is gone")
    error.rank = 1
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.rank) == ("rank 1 is gone", 1)


KILLS = """
# Forks three ranks, kills one of them while it runs collectives, and looks at what the others say.
import os, random, select, signal, sys, time
import torch
from ds_core.same_host import SameHostError, Team, new_segment

def run(segment, rank, pids, seed, report, joined):
    team, draw = Team(segment, rank, pids, 60.0), random.Random(seed)
    os.write(joined, b".")
    try:
        while True:
            numel, which = draw.choice([10, 10_000, 600_000]), draw.random()
            if which < 0.4:
                team.all_reduce(torch.ones(numel))
            elif which < 0.7:
                team.broadcast(torch.ones(numel), numel % 3)
            else:
                team.all_gather(torch.empty(3 * numel), torch.ones(numel))
    except SameHostError as error:
        os.write(report, f"{time.monotonic()} {error.rank} {error}\\n".encode())
    os._exit(0)

torch.set_num_threads(1)
for seed in range(int(sys.argv[1])):
    segment, pids, reports = new_segment(3), [], []
    gates = [os.pipe() for _ in range(4)]
    for rank in range(3):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            everyone = [int(text) for text in os.read(gates[rank][0], 100).split()]
            run(segment, rank, everyone, seed, write, gates[3][1])
        os.close(write)
        pids.append(pid)
        reports.append(read)
    for _, gate in gates[:3]:
        os.write(gate, " ".join(map(str, pids)).encode())
    for _ in range(3):  # all have joined the team
        os.read(gates[3][0], 1)
    time.sleep(random.Random(seed).random() * 0.05)
    victim = seed % 3
    killed = time.monotonic()
    os.kill(pids[victim], signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
    for rank, report in enumerate(reports):
        text = os.read(report, 1000).decode()
        os.close(report)
        if rank != victim:
            # The first rank that sees it leaves, which the other may see first.
            at, named, message = text.split(maxsplit=2)
            assert int(named) == victim, (seed, rank, text)
            assert f"rank {victim} of the team is gone" in message or f"failure of rank {victim}" in message, text
            assert float(at) - killed < 5.0, text
    for fd in (segment, *(fd for gate in gates for fd in gate)):
        os.close(fd)
print("all named")
"""


@pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.full)])
def test_a_killed_rank_is_named_and_nothing_is_left(times: int) -> None:
    if not same_host.is_available():
        pytest.skip("needs Linux and the native module")
    before = set(os.listdir("/dev/shm"))
    run = subprocess.run(
        [sys.executable, "-c", KILLS, str(times)], capture_output=True, text=True, timeout=20 + 3 * times
    )
    assert run.returncode == 0, run.stderr
    assert "all named" in run.stdout
    assert set(os.listdir("/dev/shm")) <= before
