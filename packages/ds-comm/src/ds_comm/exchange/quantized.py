"""Quantised all-gather (qwZ) and reduce-scatter (qgZ) of ZeRO++, with the call signatures of FSDP2's `Comm`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.compress.blocks import Blocks
from ds_comm.compress.integer import IntCompressor
from ds_comm.compress.interfaces import Compressor
from ds_comm.exchange.channel import Chain, Channel, Traffic, Work
from ds_comm.exchange.hierarchy import Hierarchy

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _Quantized:
    """What both collectives have: a compressor, the bytes counted, a number for each call."""

    def __init__(self, compressor: Compressor) -> None:
        self.compressor = compressor
        self.traffic = Traffic()
        """Calls and bytes that this rank has sent."""
        self._calls = 0
        self._blocks: tuple[int, torch.device, Blocks] | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a new tensor: FSDP2 asks for its buffers here."""
        return torch.empty(size, dtype=dtype, device=device)

    def _blocks_of(self, numel: int, device: torch.device) -> Blocks:
        if self._blocks is None or self._blocks[:2] != (numel, device):
            blocks = Blocks.uniform(numel, self.compressor.block_numel)
            # Elements behind the last one have no block.
            self._blocks = (numel, device, Blocks(table=blocks.table.to(device), numel=numel))
        return self._blocks[2]

    def _payload_bytes(self, numel: int) -> int:
        blocks = Blocks.uniform(numel, self.compressor.block_numel)
        return self.compressor.payload_bytes(Blocks(table=blocks.table, numel=numel))

    def _seed(self, rank: int) -> int:
        """Differs between calls and between ranks, and is the same when a run is repeated."""
        self._calls += 1
        return self._calls * 0x9E3779B97F4A7C15 + rank


class QuantizedAllGather(_Quantized):
    """All-gather of weights in 8 bits an element (Wang et al. 2023, ZeRO++, section 3.1: qwZ).

    Tensors that are not floating point are sent as they are. Where `input` is a part of `output`, as in FSDP2 and
    ds_zero, a rank's own slice stays exact: it may be the memory of the parameters themselves.
    """

    def __init__(self, compressor: Compressor | None = None) -> None:
        """Args:
        compressor: None: `IntCompressor(bits=8)`, rounded to nearest.
        """
        super().__init__(IntCompressor(bits=8) if compressor is None else compressor)

    def wire_bytes(self, numel: int, world_size: int) -> int:
        """Returns the bytes that a rank sends if it has `numel` elements, by formula."""
        return self._payload_bytes(numel) * (world_size - 1)

    def sent_bytes(self, numel: int, dtype: torch.dtype, size: int) -> int:
        """Returns the bytes that a rank sends in a call whose output has `numel` elements, among `size` ranks."""
        if dtype not in FLOATS:
            return numel // size * (size - 1) * dtype.itemsize
        return self.wire_bytes(numel // size, size)

    def buffer_bytes(self, numel: int, dtype: torch.dtype, size: int) -> int:
        """Returns the bytes of memory that a call needs while it runs, arguments as for `sent_bytes`."""
        return self._payload_bytes(numel // size) * (size + 1) if dtype in FLOATS else 0

    @torch.no_grad()
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Work | None:
        """`output_tensor` receives the inputs of all ranks in order of rank."""
        channel = Channel(group, self.traffic)
        own = input_tensor.contiguous().view(-1)
        out = output_tensor.view(-1)
        exact = own.dtype not in FLOATS
        if exact:
            payload = own.view(torch.uint8)
            gathered = out.view(torch.uint8)
        else:
            blocks = self._blocks_of(own.numel(), own.device)
            payload = self.compressor.payload_like(blocks, own.device)
            self.compressor.encode(own, payload, blocks, seed=self._seed(channel.rank))
            gathered = torch.empty(payload.numel() * channel.world_size, dtype=torch.uint8, device=own.device)
        first = channel.all_gather(gathered, payload, [payload.numel()] * channel.world_size)

        def decode() -> None:
            if exact:
                return
            slices = zip(gathered.chunk(channel.world_size), out.chunk(channel.world_size), strict=True)
            for rank, (part, target) in enumerate(slices):
                if rank != channel.rank or target.data_ptr() != own.data_ptr():
                    self.compressor.decode(part, target, blocks)

        work = Chain(first, decode)
        if async_op:
            return work
        work.wait()
        return None


class Encoder(Protocol):
    """Encodes the slices of one hop."""

    def __call__(self, slices: Tensor, payloads: Sequence[Tensor], blocks: Blocks, seed: int, /) -> None:
        """Encodes each row of `slices` into its payload."""


class QuantizedReduceScatter(_Quantized):
    """Reduce-scatter of gradients in 4 bits an element (ZeRO++, section 3.3: qgZ).

    With a hierarchy in two hops: pieces are encoded and exchanged inside of each machine and added in fp32, encoded
    again and exchanged across machines. A gradient is so quantised twice, whatever the number of ranks, and each
    rank sends 1 / local of the pieces across machines. Without one in one hop. Sums are in order of rank.
    """

    def __init__(
        self, compressor: Compressor | None = None, hierarchy: Hierarchy | None = None, *, local_size: int = 1
    ) -> None:
        """Args:
        compressor: None: `IntCompressor(bits=4, rounding="stochastic")`, whose errors have the mean 0.
        hierarchy: of the group that is passed to calls.
        local_size: without a hierarchy, the number of ranks on each machine whose messages `sent_bytes` and
            `buffer_bytes` count. For a prediction, where there are no groups: calls raise if it is not 1.
        """
        super().__init__(IntCompressor(bits=4, rounding="stochastic") if compressor is None else compressor)
        self.hierarchy = hierarchy
        self._local_size = local_size if hierarchy is None else dist.get_world_size(hierarchy.local)
        self.slow_traffic = Traffic() if hierarchy is not None else self.traffic
        """Sent across machines; `traffic` counts what is sent inside of them."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what this rank keeps between calls: their number, of which random numbers are a function."""
        return {"calls": self._calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads `state_dict()` of the same rank; an empty state begins anew."""
        self._calls = state.get("calls", 0)

    def wire_bytes(self, numel: int, pieces: int, world_size: int) -> int:
        """Returns the bytes that a rank sends in one hop among `world_size` ranks, if each is sent `pieces` slices of
        `numel` elements.
        """
        return self._payload_bytes(numel) * pieces * (world_size - 1)

    def sent_bytes(self, numel: int, dtype: torch.dtype, size: int) -> int:
        """Returns the bytes that a rank sends in a call whose input has `numel` elements, among `size` ranks."""
        each, local = numel // size, self._local_size
        if local == 1:
            return self.wire_bytes(each, 1, size)
        return self.wire_bytes(each, size // local, local) + self.wire_bytes(each, 1, size // local)

    def buffer_bytes(self, numel: int, dtype: torch.dtype, size: int) -> int:
        """Returns the bytes of memory that a call needs while it runs, arguments as for `sent_bytes`."""
        each, local = numel // size, self._local_size
        payload = self._payload_bytes(each)
        sums = 4 * each * (size // local) if local > 1 else 0
        regrouped = numel * dtype.itemsize if local > 1 else 0
        return 2 * payload * size + sums + regrouped

    @torch.no_grad()
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any = dist.ReduceOp.SUM,
        async_op: bool = False,
    ) -> Work | None:
        """Rank r receives the sum (or mean) over ranks of slice r of `input_tensor`."""
        return self._start(output_tensor, input_tensor, group, op, async_op, (self._encode, self._encode))

    def _start(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool,
        encoders: tuple[Encoder, Encoder],
    ) -> Work | None:
        """As `__call__`. `encoders`: of the first and of the second hop."""
        world_size = dist.get_world_size(group)
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ValueError(f"QuantizedReduceScatter: op must be SUM or AVG, but is {op}")
        if self.hierarchy is None and self._local_size > 1:
            raise ValueError("QuantizedReduceScatter: local_size is for predictions; pass a hierarchy")
        weight = 1.0 / world_size if op == dist.ReduceOp.AVG else 1.0
        slices = input_tensor.contiguous().view(world_size, -1)
        out = output_tensor.view(-1)
        if self.hierarchy is None:
            work = self._hop(slices, out.view(1, -1), Channel(group, self.traffic), weight, encoders[0])
        else:
            work = self._two_hops(slices, out, world_size, weight, encoders)
        if async_op:
            return work
        work.wait()
        return None

    def _two_hops(
        self,
        slices: Tensor,
        out: Tensor,
        world_size: int,
        weight: float,
        encoders: tuple[Encoder, Encoder],
    ) -> Work:
        assert self.hierarchy is not None
        local, across = (
            Channel(self.hierarchy.local, self.traffic),
            Channel(self.hierarchy.across, self.slow_traffic),
        )
        if local.world_size * across.world_size != world_size:
            raise ValueError(
                f"QuantizedReduceScatter: the hierarchy has {local.world_size} x {across.world_size} ranks, but the "
                f"group has {world_size}"
            )
        # By the place of the receiver, then by its machine.
        by_place = (
            slices.view(across.world_size, local.world_size, -1).transpose(0, 1).reshape(world_size, -1)
        )
        sums = torch.empty(across.world_size, slices.shape[1], dtype=torch.float32, device=slices.device)
        first = self._hop(by_place, sums, local, 1.0, encoders[0])
        return Chain(first, lambda: self._hop(sums, out.view(1, -1), across, weight, encoders[1]))

    def _encode(self, slices: Tensor, payloads: Sequence[Tensor], blocks: Blocks, seed: int) -> None:
        for i, (part, payload) in enumerate(zip(slices, payloads, strict=True)):
            self.compressor.encode(part, payload, blocks, seed=seed + (i << 32))

    def _hop(self, slices: Tensor, out: Tensor, channel: Channel, weight: float, encode: Encoder) -> Work:
        """Sends as many slices to each rank as `out` has rows, and adds what arrives."""
        rows, numel = out.shape
        blocks = self._blocks_of(numel, slices.device)
        size = self.compressor.payload_bytes(blocks)
        sent = torch.empty(slices.shape[0] * size, dtype=torch.uint8, device=slices.device)
        encode(slices, sent.chunk(slices.shape[0]), blocks, self._seed(channel.rank))
        received = torch.empty_like(sent)
        sizes = [rows * size] * channel.world_size
        first = channel.all_to_all(received, sent, sizes, sizes)

        def add() -> None:
            for row, target in enumerate(out):
                total = target if target.dtype == torch.float32 else target.to(torch.float32)
                for rank in range(channel.world_size):
                    payload = received[(rank * rows + row) * size : (rank * rows + row + 1) * size]
                    self.compressor.decode(payload, total, blocks, weight=weight, add=rank > 0)
                if total is not target:
                    target.copy_(total)

        return Chain(first, add)
