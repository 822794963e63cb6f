"""All-to-alls of rows of a matrix, of which every rank may send another number to every other: in two hops, or
encoded.

Each has the signature of `torch.distributed.all_to_all_single`, the one that ds_moe's `AllToAll` asks for. The work
that a call returns tells in `sent_bytes` what this rank has sent, after `wait`.

Legend: n rows, H elements of each, P ranks on a machine, M machines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.exchange.channel import Chain, Done, Work
from ds_comm.exchange.hierarchy import Hierarchy
from ds_core import codes

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK_NUMEL = 256
"""Elements that share a scale."""


class CountedWork(dist.Work):
    """Steps of which each starts when the one before has ended, as `Chain`; counts what was sent."""

    def __init__(self, first: Work, *rest: Callable[[], Work | None], sent_bytes: int) -> None:
        super().__init__()
        self.sent_bytes = sent_bytes
        """Bytes of payload that this rank has sent to other ranks; complete after `wait`."""
        self._steps = Chain(first, *rest)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Waits for the last step."""
        return self._steps.wait(timeout)


def _exchange(
    output: Tensor, input: Tensor, receive: Sequence[int], send: Sequence[int], group: dist.ProcessGroup
) -> tuple[Work, int]:
    """Starts torch's all-to-all. Returns its work, and the bytes that this rank sends to others."""
    row_bytes = input[0].nbytes if input.shape[0] else 0
    sent = (sum(send) - send[dist.get_rank(group)]) * row_bytes
    work = dist.all_to_all_single(output, input, list(receive), list(send), group=group, async_op=True)
    return (Done() if work is None else work), sent


class PlainAllToAll:
    """Every rank sends one message to every other rank."""

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        group: dist.ProcessGroup,
        async_op: bool,
    ) -> CountedWork:
        """Sends `input_split_sizes[r]` rows of `input` to rank r; `output` receives those of all ranks in order."""
        work, sent = _exchange(output, input, output_split_sizes, input_split_sizes, group)
        return _waited(CountedWork(work, sent_bytes=sent), async_op)


class HierarchicalAllToAll:
    """All-to-all in two hops: inside of each machine, then across machines.

    Rank (machine a, place i) first gives rows for (b, j) to its neighbour (a, j). Then it sends one message to each
    other machine, with what all its neighbours have for place i there: M - 1 messages a rank over slow links instead of
    (M - 1) P, of P times the size. The same bytes cross machines, and (P - 1) / P of all rows are moved once more
    inside. The second hop starts in `wait`.

    The results have the same bits as those of one hop. The numbers of rows travel inside of the machine first: 8 M
    bytes from every rank to each of its neighbours.
    """

    def __init__(self, local_size: int) -> None:
        """
        Args:
            local_size: consecutive ranks of a group that are on one machine. A group that is not larger than that is on
                one machine, and exchanges in one hop.
        """
        if local_size < 1:
            raise ValueError(f"HierarchicalAllToAll: local_size must be positive, but is {local_size}")
        self.local_size = local_size
        self.across_bytes = 0
        """Bytes that this rank has sent across machines."""
        self._levels: dict[dist.ProcessGroup, Hierarchy] = {}

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        group: dist.ProcessGroup,
        async_op: bool,
    ) -> CountedWork:
        """As `PlainAllToAll`. The first call with a group makes the groups of both hops.

        Raises:
            ValueError: `local_size` does not divide the ranks of the group.
        """
        if dist.get_world_size(group) <= self.local_size or self.local_size == 1:
            work, sent = _exchange(output, input, output_split_sizes, input_split_sizes, group)
            self.across_bytes += sent if self.local_size == 1 else 0
            return _waited(CountedWork(work, sent_bytes=sent), async_op)
        if group not in self._levels:
            self._levels[group] = Hierarchy.of(self.local_size, group)
        hops = _TwoHops(self._levels[group], output, output_split_sizes, input_split_sizes)
        first, sent = hops.inside(input)
        counted = CountedWork(first, lambda: self._second(hops, counted), sent_bytes=sent)
        return _waited(counted, async_op)

    def _second(self, hops: _TwoHops, work: CountedWork) -> Work:
        second, sent = hops.across()
        work.sent_bytes += sent
        self.across_bytes += sent
        return second


class _TwoHops:
    """One exchange of `HierarchicalAllToAll`."""

    def __init__(self, levels: Hierarchy, output: Tensor, receive: list[int], send: list[int]) -> None:
        self._levels, self._output = levels, output
        self._places = dist.get_world_size(levels.local)
        # (M, P): rows for each rank, and from each rank.
        self._send = torch.tensor(send).view(-1, self._places)
        self._receive = torch.tensor(receive).view(-1, self._places)
        self._arrived: Tensor | None = None
        self._bundles: list[list[int]] = []

    def inside(self, input: Tensor) -> tuple[Work, int]:
        """Starts the first hop."""
        table = self._send.T.contiguous()
        own, theirs = table.to(input.device), torch.empty_like(table, device=input.device)
        dist.all_to_all_single(theirs, own, group=self._levels.local)
        # (P, M): what each neighbour has for this place, by machine.
        self._bundles = theirs.tolist()
        parts = input.split(self._send.reshape(-1).tolist())
        by_place = torch.cat(
            [parts[b * self._places + j] for j in range(self._places) for b in range(len(self._send))]
        )
        receive = [sum(row) for row in self._bundles]
        self._arrived = input.new_empty(sum(receive), *input.shape[1:])
        work, sent = _exchange(self._arrived, by_place, receive, table.sum(1).tolist(), self._levels.local)
        return work, sent + (own.nbytes - own[0].nbytes)

    def across(self) -> tuple[Work, int]:
        """Starts the second hop."""
        assert self._arrived is not None
        machines = len(self._send)
        parts = self._arrived.split([count for row in self._bundles for count in row])
        by_machine = torch.cat(
            [parts[i * machines + b] for b in range(machines) for i in range(self._places)]
        )
        send = [sum(row[b] for row in self._bundles) for b in range(machines)]
        self._arrived = None
        return _exchange(self._output, by_machine, self._receive.sum(1).tolist(), send, self._levels.across)


@dataclass(frozen=True)
class _RowCode:
    """How a row of `numel` floats is encoded: its scales, one for each 256 elements, then its codes."""

    numel: int
    bits: int

    @property
    def padded(self) -> int:
        """Elements with codes: a multiple of 8."""
        return -(-self.numel // 8) * 8

    @property
    def num_scales(self) -> int:
        return -(-self.numel // _BLOCK_NUMEL)

    @property
    def nbytes(self) -> int:
        """Bytes of an encoded row."""
        return 4 * self.num_scales + self.padded * self.bits // 8

    def blocks(self, num_rows: int, device: torch.device) -> Tensor:
        """The table of ds_core's codes for `num_rows` rows behind each other."""
        begins = torch.arange(0, self.numel, _BLOCK_NUMEL)
        lengths = (self.numel - begins).clamp(max=_BLOCK_NUMEL)
        starts = begins + self.padded * torch.arange(num_rows).unsqueeze(1)
        return torch.stack([starts, lengths.expand_as(starts)], 2).view(-1, 2).to(device)

    def encode(self, rows: Tensor) -> Tensor:
        """From (n, numel) to (n, nbytes) uint8."""
        num = rows.shape[0]
        if self.padded != self.numel:
            rows = torch.nn.functional.pad(rows, (0, self.padded - self.numel))
        scales = torch.empty(num * self.num_scales, device=rows.device)
        packed = torch.empty(num * self.padded * self.bits // 8, dtype=torch.uint8, device=rows.device)
        if num:
            table = self.blocks(num, rows.device)
            codes.int_encode(rows.contiguous().view(-1), table, scales, packed, bits=self.bits)
        of_rows = scales.view(torch.uint8).view(num, 4 * self.num_scales)
        return torch.cat([of_rows, packed.view(num, self.padded * self.bits // 8)], 1)

    def decode(self, encoded: Tensor, out: Tensor) -> None:
        """Writes (n, numel)."""
        num = encoded.shape[0]
        if not num:
            return
        scales = encoded[:, : 4 * self.num_scales].contiguous().view(-1).view(torch.float32)
        packed = encoded[:, 4 * self.num_scales :].contiguous().view(-1)
        same = self.padded == self.numel and out.is_contiguous()
        whole = out if same else out.new_empty(num, self.padded)
        codes.int_decode(scales, packed, self.blocks(num, out.device), whole.view(-1), bits=self.bits)
        if not same:
            out.copy_(whole[:, : self.numel])


class QuantizedAllToAll:
    """All-to-all of rows in 8 or 4 bits an element, rounded to nearest, with a scale for each 256 elements of a row.

    A block with the largest magnitude A is off by at most A / 254 (8 bits) or A / 14 (4 bits); zeros stay zeros. Rows
    are encoded once, whatever the number of hops. What a rank sends to itself is encoded, too, so that a token's result
    does not depend on where its expert is. Rows that are not fp32, bf16 or fp16 are sent as they are.
    """

    def __init__(self, bits: int = 8, over: PlainAllToAll | HierarchicalAllToAll | None = None) -> None:
        """
        Args:
            bits: 4 or 8.
            over: exchanges the encoded rows. None: torch's all-to-all.
        """
        if bits not in (4, 8):
            raise ValueError(f"QuantizedAllToAll: bits must be 4 or 8, but is {bits}")
        self.bits = bits
        self.over = PlainAllToAll() if over is None else over

    def row_bytes(self, numel: int) -> int:
        """Returns the bytes that are sent for a row of `numel` elements."""
        return _RowCode(numel, self.bits).nbytes

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        group: dist.ProcessGroup,
        async_op: bool,
    ) -> Any:
        """As `PlainAllToAll`."""
        if input.dtype not in _FLOATS:
            return self.over(output, input, output_split_sizes, input_split_sizes, group, async_op)
        code = _RowCode(input.shape[1:].numel(), self.bits)
        encoded = code.encode(input.flatten(1))
        received = encoded.new_empty(output.shape[0], code.nbytes)
        first = self.over(received, encoded, output_split_sizes, input_split_sizes, group, True)
        work = _Decoded(first, lambda: code.decode(received, output.view(output.shape[0], code.numel)))
        return _waited(work, async_op)


class _Decoded(CountedWork):
    def __init__(self, first: CountedWork, decode: Callable[[], None]) -> None:
        super().__init__(first, self._counted, decode, sent_bytes=0)
        self._first = first

    def _counted(self) -> None:
        self.sent_bytes = self._first.sent_bytes


def _waited(work: CountedWork, async_op: bool) -> CountedWork:
    if not async_op:
        work.wait()
    return work
