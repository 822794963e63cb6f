"""Everything that `shard` made for one model, tied together."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_zero.comm.collectives import Comm
from ds_zero.comm.ranks import Ranks
from ds_zero.comm.watchdog import Waiting
from ds_zero.config import ZeroConfig
from ds_zero.interfaces import Norms, ShardStore
from ds_zero.params.gathered_context import OpenGather
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.gathering.gather import Gatherer
from ds_zero.runtime.gathering.module_hooks import ModuleHooks
from ds_zero.runtime.gathering.unit_gathering import UnitGathering
from ds_zero.runtime.gradients.backward import BackwardWatch
from ds_zero.runtime.gradients.norms import combine
from ds_zero.runtime.gradients.reduce import Reducer
from ds_zero.runtime.optimizer_options import OptimizerOptions
from ds_zero.runtime.step import Stepper
from ds_zero.runtime.storage import GRAD, visit

if TYPE_CHECKING:
    from ds_zero.runtime.gradients.loss_scaler import LossScaler


class Removable(Protocol):
    """What `destroy` takes away: a hook, or a group of ranks."""

    def remove(self) -> None: ...


@dataclass(eq=False, kw_only=True)
class ZeroState:
    """Owns buckets, hooks and stores; points weakly to the model and the optimizer."""

    stage: int
    config: ZeroConfig
    ranks: Ranks
    comm: Comm
    store: ShardStore
    norms: Norms
    norm_groups: tuple[Ranks, ...]
    """Groups over which the norm is summed, one after the other; see [Note: where ranks meet]."""
    buckets: list[Bucket]
    gatherer: Gatherer
    gathering: UnitGathering
    reducer: Reducer
    stepper: Stepper
    hooks: ModuleHooks
    waiting: Waiting
    watch: BackwardWatch
    options: OptimizerOptions
    model: weakref.ref[nn.Module]
    optimizer: weakref.ref[Optimizer] | None
    """None until `shard` or `shard_optimizer` was given one."""
    names: Mapping[str, tuple[str, ...]]
    """First name of every parameter -> all its names (tied parameters have several)."""
    scaler: LossScaler | None = None
    handles: list[Removable] = field(default_factory=list)
    open_gathers: list[OpenGather] = field(default_factory=list)
    """`gathered` contexts that are open now, outer ones first."""
    refuses_state_dict: bool = True
    """[Note: state_dict of a sharded model]"""

    def is_written(self, bucket: Bucket) -> bool:
        """Whether an open `gathered` context will adopt what is written into this bucket."""
        return any(o.writes and any(b is bucket for b in o.buckets) for o in self.open_gathers)

    def bucket_of(self, param: nn.Parameter) -> tuple[Bucket, int]:
        for bucket in self.buckets:
            for index, candidate in enumerate(bucket.params):
                if candidate is param:
                    return bucket, index
        raise ValueError("this parameter does not belong to the sharded model")

    def refresh(self) -> None:
        """After masters were written: bring low-precision shards, whole buckets and other ranks up to
        date.
        """
        self.stepper.publish()
        self.stepper.wait()
        self.gatherer.drop_unused()

    def measure(self) -> Tensor:
        """2-norm of the gradients that the optimizer would see now, 0-dim fp32 on the CPU; not finite where an
        element is not. Collective; `reducer.finish` comes first.
        """
        here = [b for b in self.buckets if not b.storage.is_away(GRAD)]
        away = [b for b in self.buckets if b.storage.is_away(GRAD)]
        own, _ = self.norms(self._grad_pieces(here))
        if away:
            sums = [own]
            with closing(visit(away, (GRAD,))) as visited:
                sums += [self.norms(self._grad_pieces([bucket]))[0] for bucket in visited]
            own = math.fsum(sums)
        device = self.buckets[0].device if self.buckets else torch.device("cpu")
        norm = math.sqrt(combine(own, self.norm_groups, device))
        pending = self.stepper.pending
        if not pending.unscaled:
            norm /= pending.loss_scale
        found = torch.tensor(norm, dtype=torch.float32)
        return found if pending.clip is None else found * pending.clip

    def _grad_pieces(self, buckets: Sequence[Bucket]) -> list[Tensor]:
        """This rank's part of every gradient; the parts of all ranks are disjoint and complete, in stage 0
        too.
        """
        pieces: list[Tensor] = []
        for bucket in buckets:
            if not bucket.trainable:
                continue
            # Where nobody reduces, gradients of ranks differ, and each rank answers for all of its own.
            own = self.reducer.reduction == "none"
            begin, end = bucket.owned_range if own else bucket.slice_range
            first = bucket.owned_range[0]
            with bucket.storage.opened(GRAD) as grad:
                for shard, slot, counted in zip(
                    bucket.shards, bucket.layout.slots, bucket.counted, strict=True
                ):
                    low, high = max(slot.offset, begin), min(slot.end, end)
                    if high > low and shard.grad is not None and counted:
                        pieces.append(grad[low - first : high - first])
        return pieces
