"""Replacements for collectives that send other bytes than their tensors have, such as quantised ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
    MakesStaging,
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
        self._held: dict[ShardKey, Tensor | None] = {}
        self._num_bytes: dict[ShardKey, int] = {}
        self.simulates_accelerator = getattr(store, "simulates_accelerator", False)

    @property
    def held(self) -> list[Tensor]:
        """The memory of frozen parameters."""
        return [tensor for tensor in self._held.values() if tensor is not None]

    def reserve(self, plan: Sequence[Reservation]) -> Mapping[ShardKey, Tensor]:
        stored = stored_items(plan, self._given)
        frozen = [item for item, given in zip(stored, plan, strict=True) if item is not given]
        mapped = dict(self._store.reserve(stored))
        self._num_bytes.update({item.key: item.numel for item in frozen})
        self._held.update({item.key: mapped.pop(item.key, None) for item in frozen})
        return mapped

    def load(self, key: ShardKey, out: Tensor) -> Work:
        if key not in self._held:
            return self._store.load(key, out)
        if self._held[key] is None:
            self.staging(self._num_bytes[key], torch.uint8, out.device)  # freed at once: for the largest sum
        return Done()

    def store(self, key: ShardKey, src: Tensor) -> Work:
        return Done() if key in self._held else self._store.store(key, src)

    def staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a buffer of the store that it stands in front of."""
        if isinstance(self._store, MakesStaging):
            return self._store.staging(numel, dtype, device)
        return torch.empty(numel, dtype=dtype, device=device)

    def sink_grad(self, key: ShardKey, grad: Tensor, *, offset: int, accumulate: bool) -> Work:
        return self._store.sink_grad(key, grad, offset=offset, accumulate=accumulate)

    def release(self, key: ShardKey) -> None:
        self._held.pop(key, None)
        self._store.release(key)

    def close(self) -> None:
        self._held.clear()
        self._store.close()


def stored_items(plan: Sequence[Reservation], frozen: FrozenParams | None) -> list[Reservation]:
    """Returns what a store keeps: frozen parameters as the bytes of a `FrozenParams`, and all others as they are.

    Args:
        frozen: None: all items are kept as they are.
    """
    if frozen is None:
        return list(plan)
    trained = {item.key.name for item in plan if item.key.kind == "grad"}
    stored = []
    for item in plan:
        if item.key.kind == "param" and item.key.name not in trained:
            num_bytes = frozen.stored_bytes(item.numel, item.dtype)
            if num_bytes:
                item = replace(item, numel=num_bytes, dtype=torch.uint8)
        stored.append(item)
    return stored


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
