"""Replacements for collectives that send other bytes than their tensors have, such as quantised ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ds_zero.comm.collectives import Collectives, Comm, default_comm
from ds_zero.comm.works import Done, Then
from ds_zero.config import ZeroConfig
from ds_zero.interfaces import (
    CollectivePair,
    CollectiveSet,
    CountsBuffers,
    CountsBytes,
    CountsState,
    FrozenParams,
    ReduceScatter,
    Reservation,
    ShardKey,
    ShardStore,
    Work,
)
from ds_zero.params.stores import ResidentStore
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

    def __init__(self, counts: CountsBytes) -> None:
        super().__init__(counts)
        self._kept: dict[str, Tensor] = {}
        """By bucket: memory that the collective keeps between calls."""

    def for_bucket(self, name: str | None) -> ReduceScatter:
        return self if name is None else partial(self._reduce_bucket, name)

    def _reduce_bucket(
        self,
        name: str,
        output: Tensor,
        input: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> Work | None:
        if name not in self._kept and isinstance(self._counts, CountsState):
            needed = self._counts.state_bytes(input.numel(), input.dtype, group.size())
            self._kept[name] = torch.empty(needed, dtype=torch.uint8, device=input.device)
        return self(output, input, group, op, async_op)

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> Work | None:
        return self._start(input, group)


class PlannedFrozen:
    """`FrozenParams` without values: memory and bytes as those that are given."""

    def __init__(self, given: FrozenParams, default: Collectives) -> None:
        counts = _counting(given.all_gather)
        self.all_gather = default.all_gather if counts is None else CountedAllGather(counts)
        self._given = given

    def stored_in(self, store: ShardStore) -> ShardStore:
        return FrozenStandIn(store, self._given)

    def stored_bytes(self, numel: int, dtype: torch.dtype) -> int:
        return self._given.stored_bytes(numel, dtype)


class FrozenStandIn(ResidentStore):
    """A store whose frozen parameters take the bytes of a `FrozenParams`, and have no values."""

    def __init__(self, store: ShardStore, given: FrozenParams) -> None:
        super().__init__()
        self._store, self._given = store, given
        self._held: dict[ShardKey, Tensor] = {}
        self.simulates_accelerator = getattr(store, "simulates_accelerator", False)

    @property
    def held(self) -> list[Tensor]:
        """The memory of frozen parameters."""
        return list(self._held.values())

    def reserve(self, plan: Sequence[Reservation]) -> Mapping[ShardKey, Tensor]:
        trained = {item.key.name for item in plan if item.key.kind == "grad"}
        others = []
        for item in plan:
            if item.key.kind != "param" or item.key.name in trained:
                others.append(item)
                continue
            needed = self._given.stored_bytes(item.numel, item.dtype)
            self._held[item.key] = torch.zeros(needed, dtype=torch.uint8, device=item.device)
        return self._store.reserve(others)

    def load(self, key: ShardKey, out: Tensor) -> Work:
        return Done() if key in self._held else self._store.load(key, out)

    def store(self, key: ShardKey, src: Tensor) -> Work:
        return Done() if key in self._held else self._store.store(key, src)

    def sink_grad(self, key: ShardKey, grad: Tensor, *, offset: int, accumulate: bool) -> Work:
        return self._store.sink_grad(key, grad, offset=offset, accumulate=accumulate)

    def release(self, key: ShardKey) -> None:
        if self._held.pop(key, None) is None:
            self._store.release(key)

    def close(self) -> None:
        self._held.clear()
        self._store.close()


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
    frozen = None if given.frozen is None else PlannedFrozen(given.frozen, own)
    axes = {axis: pair(one) for axis, one in given.axes.items()}
    return Comm(own.all_gather, own.reduce_scatter, axes=axes, frozen=frozen)


def _counting(collective: object) -> CountsBytes | None:
    return collective if isinstance(collective, CountsBytes) else None
