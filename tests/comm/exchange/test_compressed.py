"""The two-phase compressed all-reduce against the same arithmetic in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.compress import Blocks, ErrorFeedback, SignCompressor
from ds_comm.exchange import Channel, CompressedAllReduce, wire
from harness import ranks

SIZES = [3000, 70, 1, 9000]


def _signs(x: Tensor, blocks: Blocks) -> Tensor:
    """What remains of `x` when it is compressed: written from the formula, element by element."""
    out = torch.zeros_like(x)
    for begin, numel in blocks.table.tolist():
        part = x[begin : begin + numel]
        scale = part.double().abs().sum().div(numel).float()
        out[begin : begin + numel] = torch.where(part.signbit(), -scale, scale)
    return out


def _values(rank: int, call: int, blocks: Blocks) -> Tensor:
    x = torch.zeros(blocks.numel)
    for begin, numel in blocks.table.tolist():
        seed = torch.Generator().manual_seed(1000 * call + 10 * rank + begin)
        x[begin : begin + numel] = torch.randn(numel, generator=seed) * (1.0 + begin % 7)
    return x


def _feedback(blocks: Blocks, compressor: SignCompressor) -> ErrorFeedback:
    return ErrorFeedback(compressor, blocks, rank=dist.get_rank(), world_size=dist.get_world_size())


@ranks(1, 2, 3, 4)
def test_against_one_process(world_size: int) -> None:
    compressor = SignCompressor(block_numel=1024)
    blocks, _ = Blocks.of(SIZES, compressor.block_numel)
    feedback = _feedback(blocks, compressor)
    reduce = CompressedAllReduce(Channel(), feedback)
    worker, server = [torch.zeros(blocks.numel) for _ in range(world_size)], torch.zeros(blocks.numel)
    should, did = torch.zeros(blocks.numel), torch.zeros(blocks.numel)
    for call in range(4):
        values = [_values(rank, call, blocks) for rank in range(world_size)]
        mean = torch.zeros(blocks.numel)
        for rank in range(world_size):
            sent = _signs(values[rank] + worker[rank], blocks)
            worker[rank] = values[rank] + worker[rank] - sent
            mean += sent / world_size
        expected = _signs(mean + server, blocks)
        server = mean + server - expected
        x = values[dist.get_rank()].clone()
        reduce(x)
        if world_size > 1:
            torch.testing.assert_close(x, expected)
            torch.testing.assert_close(feedback.worker, worker[dist.get_rank()], rtol=1e-5, atol=1e-5)
        should += torch.stack(values).mean(0)
        did += x
    # Nothing is lost: what was not sent is in the residuals.
    start = feedback.server_start
    servers = torch.zeros(blocks.numel)
    servers[start : start + feedback.server.numel()] = feedback.server
    dist.all_reduce(servers)
    dist.all_reduce(workers := feedback.worker.clone())
    torch.testing.assert_close(did + workers / world_size + servers, should, rtol=1e-4, atol=1e-4)


@ranks(2, 4)
def test_the_formula_counts_the_bytes(world_size: int) -> None:
    compressor = SignCompressor()
    blocks, _ = Blocks.of([1_000_000, 500, 300_000], compressor.block_numel)
    channel = Channel()
    reduce = CompressedAllReduce(channel, _feedback(blocks, compressor))
    reduce(torch.randn(blocks.numel))
    assert channel.traffic.num_calls == 2
    assert channel.traffic.num_bytes == reduce.wire_bytes()
    dense = wire.all_reduce_bytes(4 * 1_300_500, world_size)
    assert dense / 32 < reduce.wire_bytes() < 1.03 * dense / 32


@ranks(3)
def test_more_ranks_than_blocks() -> None:
    blocks, compressor = Blocks.uniform(100, 2048), SignCompressor()
    reduce = CompressedAllReduce(Channel(), _feedback(blocks, compressor))
    x = torch.full((blocks.numel,), float(dist.get_rank() + 1))
    reduce(x)
    torch.testing.assert_close(x[:100], torch.full((100,), 2.0))


@ranks(2)
def test_asynchronous_calls_advance_in_their_order() -> None:
    compressor = SignCompressor()
    blocks = Blocks.uniform(5000, compressor.block_numel)
    inputs = [torch.randn(blocks.numel) for _ in range(3)]
    results: list[list[Tensor]] = []
    for asynchronous in (False, True):
        channel = Channel()
        tensors = [x.clone() for x in inputs]
        works = [
            CompressedAllReduce(channel, _feedback(blocks, compressor))(x, async_op=asynchronous)
            for x in tensors
        ]
        for work in works:
            work.wait()
        results.append(tensors)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@ranks(2)
def test_dtypes_and_a_separate_output() -> None:
    compressor = SignCompressor()
    blocks = Blocks.uniform(640, compressor.block_numel)
    x = torch.randn(640).to(torch.bfloat16)
    before, out = x.clone(), torch.empty(640)
    CompressedAllReduce(Channel(), _feedback(blocks, compressor))(x, out)
    assert torch.equal(x, before)
    assert out.abs().unique().numel() == 1


@ranks(2)
def test_wrong_arguments() -> None:
    compressor = SignCompressor()
    blocks = Blocks.uniform(640, compressor.block_numel)
    wrong = ErrorFeedback(compressor, blocks, rank=0, world_size=3)
    with pytest.raises(ValueError, match=r"those of rank 0 of 3, but the channel is that of rank . of 2"):
        CompressedAllReduce(Channel(), wrong)
    reduce = CompressedAllReduce(Channel(), _feedback(blocks, compressor))
    with pytest.raises(ValueError, match=r"x must be 1-D with 640 elements, but has shape \(64, 10\)"):
        reduce(torch.zeros(64, 10))
