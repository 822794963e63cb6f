"""Measures the links between the ranks of a job, and the compressors on one rank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.compress.blocks import Blocks
from ds_comm.compress.integer import IntCompressor
from ds_comm.compress.interfaces import Compressor
from ds_comm.compress.sign import SignCompressor
from ds_comm.exchange.hierarchy import Hierarchy
from ds_comm.interfaces import Leaves
from ds_comm.links.costs import Codec, Link, Links
from ds_comm.same_host.peer_memory import PeerMemory, connect

_SMALL, _LARGE = 1 << 10, 1 << 24
"""Bytes that a rank sends, from which latency and rate are taken."""
_CODEC_NUMEL = 1 << 21


def measure_links(local_size: int, *, device: torch.device | None = None, rounds: int = 5) -> Links:
    """Measures direct exchanges among the ranks of each machine, and among the ranks with the same place on all
    machines, while all ranks take part. Collective.

    Args:
        local_size: ranks on each machine; consecutive ranks share one.
        device: device of the tensors. Default: the CPU.
        rounds: measurements, of which the median counts.

    Returns:
        The links of the slowest rank; the same on every rank.
    """
    device = device or torch.device("cpu")
    hosts = dist.get_world_size() // local_size
    hierarchy = Hierarchy.of(local_size)
    try:
        within = between = shared = None
        if local_size > 1:
            within = _link(lambda sizes: _messages(hierarchy.local, sizes, device), rounds, device)
            near = connect(hierarchy.local, device, _Never())
            if _all_true(near is not None, device):
                assert near is not None
                peers = near
                shared = _link(lambda size: _peers(peers, hierarchy.local, size), rounds, device)
        if hosts > 1:
            between = _link(lambda sizes: _messages(hierarchy.across, sizes, device), rounds, device)
    finally:
        hierarchy.destroy()
    compressors: dict[str, Compressor] = {
        "sign": SignCompressor(),
        "int8": IntCompressor(bits=8),
        "int4": IntCompressor(bits=4, rounding="stochastic"),
    }
    codecs = {name: _codec(compressor, device, rounds) for name, compressor in compressors.items()}
    return Links(within_host=within, between_hosts=between, shared_memory=shared, codecs=codecs)


class _Never:
    """`Abort` that is never raised."""

    raised = False

    def add(self, member: Leaves, /) -> None:
        """Does nothing."""


def _link(exchange: Callable[[int], Callable[[], object]], rounds: int, device: torch.device) -> Link:
    """Returns the link over which `exchange(size)()` sends so many bytes from each rank."""
    small, large = (_seconds(exchange(size), rounds, device) for size in (_SMALL, _LARGE))
    return Link(latency_s=small, bytes_per_s=_LARGE / max(large - small, 1e-9))


def _messages(group: dist.ProcessGroup, size: int, device: torch.device) -> Callable[[], object]:
    ranks = dist.get_world_size(group)
    each = -(-size // (ranks - 1))
    sent = torch.ones(ranks * each, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    return lambda: dist.all_to_all_single(received, sent, group=group)


def _peers(peers: PeerMemory, group: dist.ProcessGroup, size: int) -> Callable[[], object]:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    each = -(-size // (ranks - 1))
    sent = torch.ones(ranks, each, dtype=torch.uint8)
    received = torch.empty_like(sent)

    def exchange() -> None:
        work = peers.exchange(1)
        for step in range(1, ranks):
            to, origin = (rank + step) % ranks, (rank - step) % ranks
            work.receive(origin, [received[origin]])
            work.send(to, [sent[to]])
        work.wait()

    return exchange


def _codec(compressor: Compressor, device: torch.device, rounds: int) -> Codec:
    blocks = Blocks.uniform(_CODEC_NUMEL, compressor.block_numel)
    blocks = Blocks(table=blocks.table.to(device), numel=_CODEC_NUMEL)
    values = torch.randn(_CODEC_NUMEL, device=device)
    payload = compressor.payload_like(blocks, device)
    encode = _seconds(lambda: compressor.encode(values, payload, blocks, seed=1), rounds, device)
    decode = _seconds(lambda: compressor.decode(payload, values, blocks), rounds, device)
    return Codec(encode_bytes_per_s=values.nbytes / encode, decode_bytes_per_s=values.nbytes / decode)


def _seconds(call: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Returns the median duration of a call on the slowest rank."""
    call()
    measured = []
    for _ in range(rounds):
        dist.barrier()
        begin = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        measured.append(time.perf_counter() - begin)
    value = torch.tensor([statistics.median(measured)], dtype=torch.float32, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def _all_true(flag: bool, device: torch.device) -> bool:
    value: Tensor = torch.tensor([int(flag)], device=device)
    dist.all_reduce(value, dist.ReduceOp.MIN)
    return bool(value.item())
