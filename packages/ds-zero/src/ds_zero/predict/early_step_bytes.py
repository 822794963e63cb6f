"""The memory of `ZeroConfig(overlap_step=True)`: values before and after an update that may be taken back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ds_zero.interfaces import ShardKey, Tier
from ds_zero.layout.buckets import FROZEN, BucketLayout, piece_of
from ds_zero.predict.tiers import STATE
from ds_zero.runtime.materialize import dtype_of

if TYPE_CHECKING:
    from ds_zero.predict.simulate import Job


@dataclass(frozen=True, kw_only=True)
class EarlyStepBytes:
    """Bytes of rank 0 in each tier."""

    device: int = 0
    host: int = 0
    disk: int = 0


def early_step_bytes(
    job: Job, layouts: Sequence[BucketLayout], tiers: Mapping[ShardKey, Tier]
) -> EarlyStepBytes:
    """Returns the bytes of the values of [Note: early steps], as `runtime.early_step` limits them."""
    if not job.config.overlap_step or not (job.undoable or job.pages_states):
        return EarlyStepBytes()
    total: Counter[Tier] = Counter()
    limit, used, gradient = job.config.undo_bytes, 0, 0
    # Gradients are reduced into staging buffers, which are counted already.
    in_staging = job.on_cpu and job.config.grad_dtype == torch.float32
    for layout in layouts:
        if layout.group == FROZEN or dtype_of(layout) == torch.float32:
            continue
        needs = _needs(job, layout, tiers)
        in_memory = needs["device"] + needs["host"]
        total["disk"] += needs["disk"]  # reserved for all buckets at once
        if limit is not None and used + in_memory > limit:
            continue
        used += in_memory
        total["device"] += needs["device"]
        total["host"] += needs["host"]
        if tiers[ShardKey(name=layout.name, kind="grad")] == "disk" and not in_staging:
            begin, end = layout.owned_range(0)
            gradient = max(gradient, 4 * (end - begin))
    # The gradient of which a bucket is updated stays in memory while others arrive.
    return EarlyStepBytes(device=total["device"], host=total["host"] + gradient, disk=total["disk"])


def _needs(job: Job, layout: BucketLayout, tiers: Mapping[ShardKey, Tier]) -> Counter[Tier]:
    """Returns the bytes of one bucket in each tier."""
    begin, end = layout.owned_range(0)
    stepped = sum(piece_of(slot, begin, end).numel for slot in layout.slots)
    needs: Counter[Tier] = Counter()
    param = "device" if layout.unit is None else tiers[ShardKey(name=layout.name, kind="param")]
    # New parameters whose old ones are in memory are kept apart on the host.
    needs["disk" if param == "disk" else "host"] += (end - begin) * dtype_of(layout).itemsize
    needs[tiers[ShardKey(name=layout.name, kind="master")]] += stepped * 4
    per_element = sum(dtype.itemsize for dtype in job.states.values())
    needs[tiers[ShardKey(name=layout.name, kind=STATE)]] += stepped * per_element
    return needs
