"""The collectives of training, which call functions of `deepspeed.comm`, so that code that wraps or counts those
functions also covers training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

import ds_comm
from ds_zero.comm.collectives import TorchAllGather, TorchReduceScatter
from ds_zero.comm.direct import DirectAllGather, OrderedReduceScatter
from ds_zero.interfaces import AllGather, Capabilities, ReduceScatter, Transport, Work

_direct_gather: ContextVar[AllGather | None] = ContextVar("_direct_gather", default=None)
_direct_reduce: ContextVar[ReduceScatter | None] = ContextVar("_direct_reduce", default=None)
"""The collectives with the message tags and transport of the running call of training, in its thread. DeepSpeed's
functions have no arguments for these."""

_T = TypeVar("_T")


@contextlib.contextmanager
def _using(variable: ContextVar[_T | None], value: _T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def gather_slices(output: Tensor, input: Tensor, group: Any, async_op: bool) -> Work | None:
    """All-gathers by direct exchange on the CPU, by the backend elsewhere."""
    direct = _direct_gather.get() or DirectAllGather()
    collective = direct if output.device.type == "cpu" else TorchAllGather()
    return collective(output, input, group, async_op)


def reduce_slices(output: Tensor, input: Tensor, op: Any, group: Any, async_op: bool) -> Work | None:
    """Reduce-scatters: sums and means on the CPU in a fixed order of ranks, everything else by the backend."""
    summed = op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG)
    direct = _direct_reduce.get() or OrderedReduceScatter()
    collective = direct if input.device.type == "cpu" and summed else TorchReduceScatter()
    return collective(output, input, group, op, async_op)


class _Gather:
    """`AllGather` by `deepspeed.comm.allgather_fn`."""

    capabilities = Capabilities(tags=True)

    def __init__(self, direct: DirectAllGather) -> None:
        self._direct = direct

    def bound(self, number: int, transport: Transport | None) -> _Gather:
        return _Gather(self._direct.bound(number, transport))

    def __call__(
        self, output: Tensor, input: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Work | None:
        from ds_compat.comm import collectives

        with _using(_direct_gather, self._direct):
            work: Work | None = collectives.allgather_fn(output, input, group=group, async_op=async_op)
        return work


class _Reduce:
    """`ReduceScatter` by `deepspeed.comm.reduce_scatter_fn`."""

    capabilities = Capabilities(tags=True)

    def __init__(self, direct: OrderedReduceScatter) -> None:
        self._direct = direct

    def bound(self, number: int, transport: Transport | None) -> _Reduce:
        return _Reduce(self._direct.bound(number, transport))

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> Work | None:
        from ds_compat.comm import collectives

        with _using(_direct_reduce, self._direct):
            work: Work | None = collectives.reduce_scatter_fn(
                output, input, op=op, group=group, async_op=async_op
            )
        return work


def training_comm() -> ds_comm.Collectives:
    """Returns the collectives that `deepspeed.initialize` passes to `ds_engine.initialize`."""
    return ds_comm.collectives(
        all_gather=_Gather(DirectAllGather()), reduce_scatter=_Reduce(OrderedReduceScatter())
    )
