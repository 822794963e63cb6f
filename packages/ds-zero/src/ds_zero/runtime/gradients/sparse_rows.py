"""Gradients of embeddings that travel as the rows that are not zero.

[Note: gradients by rows]
A micro-batch touches as many rows of an embedding as it has different tokens, often one in a hundred. In stage 0
ranks tell each other how many rows they have, then send those with their indices to everybody, and every rank adds
them in the order of the fixed binary tree over ranks, [Note: ordered reduction]; a row that a rank did not send is a
row of zeros in it. So the sum is bitwise the one that the whole gradient would have given. The counts also say, on
every rank alike, where rows would be more bytes than the whole (an embedding whose weight is the head's, too): then
the whole travels.

What is zero is looked up in the gradient itself, whether or not autograd made it sparse: reading an embedding once is
little beside sending it, and accumulation needs no lists of indices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_zero.comm.collectives import Comm
from ds_zero.comm.direct import SUM_CHUNK_NUMEL, sum_tree
from ds_zero.comm.topology import Topology
from ds_zero.interfaces import Work
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.gradients.reduce_bucket import Flight, WirePolicy, launch, operation
from ds_zero.tensors.storage import is_fake, same_place

INDEX = torch.int32
"""Enough for the rows of any embedding that fits into memory."""


def row_parameters(model: nn.Module, stage: int, topology: Topology) -> frozenset[int]:
    """Identities of the parameters whose gradient has rows of zeros: the weights of embeddings.

    Raises:
        ValueError: rows cannot travel, because ranks own parts of gradients, or groups of ranks are replicas.
    """
    if stage > 0:
        raise ValueError(
            f"sparse_gradients=True with stage={stage}: each rank receives only its part of every gradient there, and "
            "rows are cut; use stage 0, or sparse_gradients=False"
        )
    if any(ranks.replicas is not None for ranks in topology.axes):
        raise ValueError(
            "sparse_gradients=True with a mesh of two axes (replicate, shard): pass a mesh of one axis"
        )
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return frozenset(id(m.weight) for m in model.modules() if isinstance(m, kinds))


class RowFlight(Flight):
    """Rows of one bucket on their way; lands as the whole bucket, not as a slice."""

    def __init__(self, bucket: Bucket, comm: Comm, place: Tensor | None, scale: float, factor: float) -> None:
        whole = place
        if whole is None:
            whole = torch.empty(bucket.layout.padded_numel, dtype=torch.float32, device=bucket.device)
        super().__init__(bucket, _All([]), whole, whole, factor, comm)
        self._whole, self._scale = whole, scale
        self._indices: list[Tensor] = []
        self._values: list[Tensor] = []

    def send(self, rows: Tensor, values: Tensor, counts: Sequence[int]) -> None:
        """Start to send `values`, (rows, width), to everybody, and to receive theirs."""
        ranks, width = self.bucket.ranks, values.shape[1]
        # Backends of accelerators take messages of equal size.
        sizes = list(counts) if values.device.type == "cpu" else [max(counts)] * ranks.size
        begin = sum(sizes[: ranks.rank])
        works = []
        for mine, found, each in ((rows.to(INDEX), self._indices, 1), (values, self._values, width)):
            whole = torch.zeros(sum(sizes) * each, dtype=mine.dtype, device=mine.device)
            whole[begin * each : begin * each + mine.numel()] = mine.reshape(-1)
            if whole.numel():
                works.append(self._comm.gather(whole, ranks, sizes=[n * each for n in sizes]))
            parts = torch.split(whole, [n * each for n in sizes])
            found += [part[: n * each] for part, n in zip(parts, counts, strict=True)]
        self._work = _All(works)

    def land(self) -> Tensor:
        """The whole result, fp32."""
        self._work.wait()
        slot = self.bucket.layout.slots[0]
        self._whole.zero_()
        table = self._whole[slot.offset : slot.end].view(slot.shape[0], -1)
        width = table.shape[1]
        union = torch.unique(torch.cat(self._indices))
        values = [v.view(-1, width) for v in self._values]
        step = max(1, SUM_CHUNK_NUMEL // width)
        for begin in range(0, union.numel(), step):
            _add_rows(table, union[begin : begin + step], self._indices, values, self._scale)
        self._indices, self._values = [], []
        if self._factor != 1.0:
            self._whole.mul_(self._factor)
        return self._whole


def _add_rows(
    table: Tensor, rows: Tensor, indices: Sequence[Tensor], values: Sequence[Tensor], scale: float
) -> None:
    """Put the ranks' sums of `rows` into `table`; all indices ascend."""
    first, last = rows[:1], rows[-1:]
    parts = []
    for index, value in zip(indices, values, strict=True):
        low = int(torch.searchsorted(index, first))
        high = int(torch.searchsorted(index, last, right=True))
        part = value.new_zeros(rows.numel(), value.shape[1])
        part[torch.searchsorted(rows, index[low:high])] = value[low:high]
        parts.append(part.view(-1))
    total = torch.empty(rows.numel() * table.shape[1], dtype=table.dtype, device=table.device)
    sum_tree(parts, total, scale)
    table[rows.long()] = total.view(rows.numel(), -1)


class _WholeFlight(Flight):
    """The bucket as it is, where rows would be more; lands whole, too."""

    def __init__(self, inner: Flight, whole: Tensor, comm: Comm) -> None:
        super().__init__(inner.bucket, inner, whole, whole, 1.0, comm)
        self._inner, self._whole = inner, whole

    def land(self) -> Tensor:
        part, bucket = self._inner.land(), self.bucket
        own = bucket.slice_of(self._whole)
        if not same_place(part, own):
            own.copy_(part)
        self._comm.gather(self._whole, bucket.ranks, sizes=bucket.layout.slice_sizes).wait()
        return self._whole


class _All:
    """Several works as one."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def launch_rows(
    bucket: Bucket, source: Tensor, comm: Comm, policy: WirePolicy, place: Tensor | None = None
) -> Flight:
    """As `wire.launch`, for a bucket that holds one embedding and is not divided; lands as the whole bucket.

    Args:
        place: where the whole result may be put when it lands, fp32.
    """
    ranks, slot = bucket.ranks, bucket.layout.slots[0]
    if ranks.group is None:
        return launch(bucket, source, comm, policy, place)
    table = source[slot.offset : slot.end].view(slot.shape[0], -1)
    dtype = source.dtype if policy.dtype is None else policy.dtype
    if is_fake(source):  # has no values that could be looked at: the most that may travel
        return _whole(bucket, source, comm, policy, place)
    rows = (table != 0).any(1).nonzero().view(-1)  # NaN is not 0
    counts: list[int] = comm.gather_slices(rows.new_tensor([rows.numel()]), ranks, bucket.device).tolist()
    by_rows = max(counts) * ranks.size * (table.shape[1] * dtype.itemsize + INDEX.itemsize)
    if by_rows >= bucket.layout.padded_numel * (dtype.itemsize + torch.float32.itemsize):
        return _whole(bucket, source, comm, policy, place)
    op, factor = operation(ranks, policy)
    values = table[rows]
    if policy.predivide != 1.0:
        values.mul_(1.0 / policy.predivide)
    scale = 1.0 / ranks.size if op == dist.ReduceOp.AVG else 1.0
    flight = RowFlight(bucket, comm, place, scale, factor)
    flight.send(rows, values.to(dtype), counts)
    return flight


def _whole(bucket: Bucket, source: Tensor, comm: Comm, policy: WirePolicy, place: Tensor | None) -> Flight:
    whole = place
    if whole is None:
        whole = torch.empty(bucket.layout.padded_numel, dtype=torch.float32, device=bucket.device)
    return _WholeFlight(launch(bucket, source, comm, policy, bucket.slice_of(whole)), whole, comm)
