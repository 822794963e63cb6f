"""Replacements for collectives that send other bytes than their tensors have, such as quantised ones."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ds_zero.comm.collectives import Collectives, Comm, default_comm
from ds_zero.comm.works import Then
from ds_zero.config import ZeroConfig
from ds_zero.interfaces import (
    CollectivePair,
    CollectiveSet,
    CountsBuffers,
    CountsBytes,
    Work,
)
from ds_zero.predict.fake_group import FakeGroup


class _Counted:
    """Counts the bytes of a collective, and allocates its buffers until it is waited for."""

    def __init__(self, counts: CountsBytes) -> None:
        self._counts = counts

    def _start(self, whole: Tensor, group: dist.ProcessGroup) -> Work:
        assert isinstance(group, FakeGroup)
        sizes = whole.numel(), whole.dtype, group.size()
        group.count(self._counts.sent_bytes(*sizes))
        needed = self._counts.buffer_bytes(*sizes) if isinstance(self._counts, CountsBuffers) else 0
        buffers = [torch.empty(needed, dtype=torch.uint8, device=whole.device)]
        return Then([], buffers.clear)


class CountedAllGather(_Counted):
    """`AllGather` without messages."""

    def __call__(
        self, output: Tensor, input: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Work | None:
        return self._start(output, group)


class CountedReduceScatter(_Counted):
    """`ReduceScatter` without messages."""

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> Work | None:
        return self._start(input, group)


def planned_comm(given: CollectiveSet | None, config: ZeroConfig, *, on_cpu: bool) -> Comm:
    """Returns the collectives of a plan: those of `given` that count their bytes are replaced, and the others are the
    default ones of the device.
    """
    ordered = True if config.rank_invariant else config.ordered_reduction
    default = default_comm(torch.device("cpu"), ordered=on_cpu if ordered is None else ordered)
    if given is None:
        return default

    def pair(one: CollectivePair) -> Collectives:
        gather, reduce = _counting(one.all_gather), _counting(one.reduce_scatter)
        return Collectives(
            default.all_gather if gather is None else CountedAllGather(gather),
            default.reduce_scatter if reduce is None else CountedReduceScatter(reduce),
        )

    own = pair(given)
    return Comm(
        own.all_gather, own.reduce_scatter, axes={axis: pair(one) for axis, one in given.axes.items()}
    )


def _counting(collective: object) -> CountsBytes | None:
    return collective if isinstance(collective, CountsBytes) else None
