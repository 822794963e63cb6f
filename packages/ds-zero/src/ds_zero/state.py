"""`ZeroState`: the objects that `shard` creates for one model."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_zero.comm.collectives import Comm
from ds_zero.comm.ranks import Ranks
from ds_zero.comm.topology import Topology
from ds_zero.comm.watchdog import Waiting
from ds_zero.config import ZeroConfig
from ds_zero.interfaces import ShardStore
from ds_zero.params.gathered_context import OpenGather
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.checksums import NoChecksums
from ds_zero.runtime.early_step import NoEarlySteps
from ds_zero.runtime.gathering.gather import Gatherer
from ds_zero.runtime.gathering.module_hooks import ModuleHooks
from ds_zero.runtime.gathering.unit_gathering import UnitGathering
from ds_zero.runtime.gradients.arrived_norms import ArrivedNorms
from ds_zero.runtime.gradients.backward import BackwardWatch
from ds_zero.runtime.gradients.norms import combine
from ds_zero.runtime.gradients.reduce import Reducer
from ds_zero.runtime.optimizer_options import OptimizerOptions
from ds_zero.runtime.step import Stepper

if TYPE_CHECKING:
    from ds_zero.runtime.gradients.loss_scaler import LossScaler


class Removable(Protocol):
    """Something that `destroy` removes: a hook, or a process group."""

    def remove(self) -> None: ...


@dataclass(eq=False, kw_only=True)
class ZeroState:
    """The sharding of one model. Owns buckets, hooks and the store; has weak references to model and optimizer."""

    stage: int
    config: ZeroConfig
    ranks: Ranks
    comm: Comm
    store: ShardStore
    norms: ArrivedNorms
    topology: Topology
    """All axes, the groups over which the sum of squares of the norm is reduced, one after the other ([Note: norm
    across ranks]), and the parts of whole tensors that this rank holds."""
    buckets: list[Bucket]
    gatherer: Gatherer
    gathering: UnitGathering
    reducer: Reducer
    stepper: Stepper
    hooks: ModuleHooks
    waiting: Waiting
    watch: BackwardWatch
    options: OptimizerOptions
    checksums: NoChecksums
    early: NoEarlySteps
    model: weakref.ref[nn.Module]
    optimizer: weakref.ref[Optimizer] | None
    """None until an optimizer is passed to `shard` or `shard_optimizer`."""
    names: Mapping[str, tuple[str, ...]]
    """First name of each parameter -> all its names (tied parameters have several)."""
    scaler: LossScaler | None = None
    handles: list[Removable] = field(default_factory=list)
    open_gathers: list[OpenGather] = field(default_factory=list)
    """The open `gathered` contexts, outer ones first."""
    refuses_state_dict: bool = True
    """Whether torch's `state_dict` raises, [Note: state_dict of a sharded model]."""

    def is_written(self, bucket: Bucket) -> bool:
        """Whether an open `gathered(write=True)` context covers this bucket."""
        return any(o.writes and any(b is bucket for b in o.buckets) for o in self.open_gathers)

    def bucket_of(self, param: nn.Parameter) -> tuple[Bucket, int]:
        for bucket in self.buckets:
            for index, candidate in enumerate(bucket.params):
                if candidate is param:
                    return bucket, index
        raise ValueError("this parameter does not belong to the sharded model")

    def refresh(self) -> None:
        """Updates the low-precision parameters on all ranks after the masters were changed. Collective."""
        self.stepper.publish()
        self.stepper.wait()
        self.gatherer.drop_unused()

    def measure(self) -> Tensor:
        """Returns the 2-norm of the gradients as the optimizer would see them now: 0-dim fp32 on the CPU, not finite
        if an element is not. Collective. `reducer.finish` must have been called.
        """
        own = self.norms.total(self.buckets, unreduced=self.reducer.reduction == "none")
        device = self.buckets[0].device if self.buckets else torch.device("cpu")
        norm = math.sqrt(combine(own, self.topology.norm_groups, device))
        pending = self.stepper.pending
        if not pending.unscaled:
            norm /= pending.loss_scale
        measured = torch.tensor(norm, dtype=torch.float32)
        return measured if pending.clip is None else measured * pending.clip
