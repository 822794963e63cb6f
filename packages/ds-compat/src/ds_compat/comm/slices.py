"""The collectives of training, which go through `deepspeed.comm`, so that code that wraps or counts its functions sees
them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

import ds_zero
from ds_zero.comm.collectives import TorchAllGather, TorchReduceScatter
from ds_zero.comm.direct import DirectAllGather, OrderedReduceScatter
from ds_zero.comm.peer_memory import PeerMemory
from ds_zero.interfaces import AllGather, Capabilities, ReduceScatter, Work


class _Direct:
    """What the collectives of this moment use where ranks send straight to each other."""

    def __init__(self) -> None:
        self.gather: AllGather = DirectAllGather()
        self.reduce: ReduceScatter = OrderedReduceScatter()

    @contextlib.contextmanager
    def using(self, **chosen: Any) -> Iterator[None]:
        """`gather` or `reduce` inside is another one: message numbers and the memory of peers are not arguments of
        DeepSpeed's functions.
        """
        before = dict(vars(self))
        vars(self).update(chosen)
        try:
            yield
        finally:
            vars(self).update(before)


_direct = _Direct()


def gather_slices(output: Tensor, input: Tensor, group: Any, async_op: bool) -> Work | None:
    """Straight from rank to rank on the CPU, by the backend elsewhere."""
    collective = _direct.gather if output.device.type == "cpu" else TorchAllGather()
    return collective(output, input, group, async_op)


def reduce_slices(output: Tensor, input: Tensor, op: Any, group: Any, async_op: bool) -> Work | None:
    """Sums and means in the order of ranks on the CPU, by the backend elsewhere and for other operations."""
    summed = op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG)
    collective = _direct.reduce if input.device.type == "cpu" and summed else TorchReduceScatter()
    return collective(output, input, group, op, async_op)


class _Gather:
    """`AllGather` by `deepspeed.comm.allgather_fn`."""

    capabilities = Capabilities(tags=True)

    def __init__(self, direct: DirectAllGather) -> None:
        self._direct = direct

    def bound(self, number: int, peer_memory: PeerMemory | None) -> _Gather:
        return _Gather(self._direct.bound(number, peer_memory))

    def __call__(
        self, output: Tensor, input: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Work | None:
        from ds_compat.comm import collectives

        with _direct.using(gather=self._direct):
            work: Work | None = collectives.allgather_fn(output, input, group=group, async_op=async_op)
        return work


class _Reduce:
    """`ReduceScatter` by `deepspeed.comm.reduce_scatter_fn`."""

    capabilities = Capabilities(tags=True)

    def __init__(self, direct: OrderedReduceScatter) -> None:
        self._direct = direct

    def bound(self, number: int, peer_memory: PeerMemory | None) -> _Reduce:
        return _Reduce(self._direct.bound(number, peer_memory))

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> Work | None:
        from ds_compat.comm import collectives

        with _direct.using(reduce=self._direct):
            work: Work | None = collectives.reduce_scatter_fn(
                output, input, op=op, group=group, async_op=async_op
            )
        return work


def training_comm() -> ds_zero.Comm:
    """What `deepspeed.initialize` gives to training."""
    return ds_zero.Comm(_Gather(DirectAllGather()), _Reduce(OrderedReduceScatter()))
