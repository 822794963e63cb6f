"""Reduces gradients of embeddings by sending only the rows that are not zero.

[Note: gradients by rows]
A micro-batch has gradients for as many rows of an embedding as it has different tokens, often one in a hundred. In
stage 0, ranks first gather the number of nonzero rows of each rank. Then each rank sends its nonzero rows and their
indices to all others, and every rank adds them in the order of the fixed binary tree over ranks, [Note: ordered
reduction]; a row that a rank did not send counts as zeros. So the sum is bitwise that of a reduction of the whole
gradient. If the rows would be more bytes than the whole gradient (for example of an embedding that is tied to the
head), the whole gradient is reduced. All ranks decide this alike, from the gathered numbers.

The nonzero rows are searched in the gradient itself, whether or not autograd computed a sparse one. Reading an
embedding once is cheap compared with sending it, and accumulation then needs no lists of indices.
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
from ds_zero.runtime.gradients.reduce_bucket import BucketReduction, WirePolicy, launch, operation
from ds_zero.tensors.storage import is_fake, same_place

INDEX = torch.int32
"""Dtype of row indices in messages."""


def row_parameters(model: nn.Module, stage: int, topology: Topology) -> frozenset[int]:
    """Returns the `id` of each parameter whose gradient is reduced by rows: the weights of embeddings.

    Raises:
        ValueError: `stage` is not 0, or the mesh has replicas.
    """
    if stage > 0:
        raise ValueError(
            f"sparse_gradients=True with stage={stage}: from stage 1 on, each rank receives only its part of every "
            "gradient, which may begin inside a row; use stage 0, or sparse_gradients=False"
        )
    if any(ranks.replicas is not None for ranks in topology.axes):
        raise ValueError(
            "sparse_gradients=True does not support a mesh of two axes (replicate, shard): pass a mesh of one axis"
        )
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return frozenset(id(m.weight) for m in model.modules() if isinstance(m, kinds))


class RowReduction(BucketReduction):
    """The reduction of one bucket by rows. Its result is the whole bucket, not a slice."""

    def __init__(self, bucket: Bucket, comm: Comm, out: Tensor | None, scale: float, factor: float) -> None:
        whole = out
        if whole is None:
            whole = torch.empty(bucket.layout.padded_numel, dtype=torch.float32, device=bucket.device)
        super().__init__(bucket, _All([]), whole, whole, factor, comm)
        self._whole, self._scale = whole, scale
        self._indices: list[Tensor] = []
        self._values: list[Tensor] = []

    def send(self, rows: Tensor, values: Tensor, counts: Sequence[int]) -> None:
        """Starts to exchange rows between all ranks.

        Args:
            rows: (number of rows,), the indices of this rank's nonzero rows.
            values: (number of rows, width), these rows.
            counts: the number of rows of each rank.
        """
        ranks, width = self.bucket.ranks, values.shape[1]
        # Backends of accelerators require messages of equal size.
        sizes = list(counts) if values.device.type == "cpu" else [max(counts)] * ranks.size
        begin = sum(sizes[: ranks.rank])
        works = []
        for own, of_ranks, each in ((rows.to(INDEX), self._indices, 1), (values, self._values, width)):
            whole = torch.zeros(sum(sizes) * each, dtype=own.dtype, device=own.device)
            whole[begin * each : begin * each + own.numel()] = own.reshape(-1)
            if whole.numel():
                works.append(self._comm.gather(whole, ranks, sizes=[n * each for n in sizes]))
            parts = torch.split(whole, [n * each for n in sizes])
            of_ranks += [part[: n * each] for part, n in zip(parts, counts, strict=True)]
        self._work = _All(works)

    def result(self) -> Tensor:
        """Waits for the messages, and returns the whole result, in fp32."""
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
    """Writes the sums over ranks of the given `rows` to `table`. `rows` and the indices of each rank are sorted."""
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


class _WholeReduction(BucketReduction):
    """The reduction of the whole bucket, if its rows would be more bytes. Its result is the whole bucket, too."""

    def __init__(self, inner: BucketReduction, whole: Tensor, comm: Comm) -> None:
        super().__init__(inner.bucket, inner, whole, whole, 1.0, comm)
        self._inner, self._whole = inner, whole

    def result(self) -> Tensor:
        part, bucket = self._inner.result(), self.bucket
        own = bucket.slice_of(self._whole)
        if not same_place(part, own):
            own.copy_(part)
        self._comm.gather(self._whole, bucket.ranks, sizes=bucket.layout.slice_sizes).wait()
        return self._whole


class _All:
    """Waits for several operations."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def launch_rows(
    bucket: Bucket, source: Tensor, comm: Comm, policy: WirePolicy, out: Tensor | None = None
) -> BucketReduction:
    """Like `reduce_bucket.launch`, for a bucket that contains one embedding and is not sharded. The result is the whole
    bucket.

    Args:
        out: (padded_numel,), fp32, for the result; None allocates it.
    """
    ranks, slot = bucket.ranks, bucket.layout.slots[0]
    if ranks.group is None:
        return launch(bucket, source, comm, policy, out)
    table = source[slot.offset : slot.end].view(slot.shape[0], -1)
    dtype = source.dtype if policy.dtype is None else policy.dtype
    if is_fake(source):  # rows without values cannot be counted, so the maximum is assumed
        return _whole(bucket, source, comm, policy, out)
    rows = (table != 0).any(1).nonzero().view(-1)  # NaN is not 0
    counts: list[int] = comm.gather_slices(rows.new_tensor([rows.numel()]), ranks, bucket.device).tolist()
    by_rows_bytes = max(counts) * ranks.size * (table.shape[1] * dtype.itemsize + INDEX.itemsize)
    if by_rows_bytes >= bucket.layout.padded_numel * (dtype.itemsize + torch.float32.itemsize):
        return _whole(bucket, source, comm, policy, out)
    op, factor = operation(ranks, policy)
    values = table[rows]
    if policy.predivide != 1.0:
        values.mul_(1.0 / policy.predivide)
    scale = 1.0 / ranks.size if op == dist.ReduceOp.AVG else 1.0
    reduction = RowReduction(bucket, comm, out, scale, factor)
    reduction.send(rows, values.to(dtype), counts)
    return reduction


def _whole(
    bucket: Bucket, source: Tensor, comm: Comm, policy: WirePolicy, out: Tensor | None
) -> BucketReduction:
    whole = out
    if whole is None:
        whole = torch.empty(bucket.layout.padded_numel, dtype=torch.float32, device=bucket.device)
    return _WholeReduction(launch(bucket, source, comm, policy, bucket.slice_of(whole)), whole, comm)
