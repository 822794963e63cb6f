"""Options of `shard`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Accumulation = Literal["local", "sharded"]


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """Policy of `ds_zero.shard`; every default adapts to the model and the stage."""

    accumulation: Accumulation | None = None
    """How gradients of several micro-batches are summed: "local" adds whole gradients in fp32 on each rank
    and reduces once at the boundary; "sharded" reduces every micro-batch and adds shards. None: local in
    stages 0 and 1, sharded in 2 and 3. The plans differ in the last bits of the sums, within one plan all
    stages agree bitwise."""

    accumulation_steps: int | None = None
    """Backwards per optimizer step, for the local plan: the last one overlaps with its reduction. None: what
    the previous step had (the first step reduces inside `step`). A wrong number costs overlap, never a
    gradient."""

    param_dtype: torch.dtype | None = None
    """Dtype in which floating-point parameters compute; the fp32 masters keep the values from before the
    cast. None: as given."""

    reduce_bucket_numel: int | None = None
    """Elements a bucket holds at most (a larger parameter has its own), stages 0 to 2 and whole parameters of
    stage 3.
    None: an eighth of the model, between 2**18 and 2**25."""

    persistence_threshold_numel: int | None = None
    """Stage 3: parameters of at most so many elements stay whole on every rank. None: up to 1e5, within 2% of
    the model."""

    prefetch: bool = True
    """Stage 3: start gathering the next module, in the order of the previous pass, while the present one
    computes."""

    overlap_publish: bool = False
    """Stages 1 and 2: let `step` return while parameters are still being gathered; modules wait before they
    read. Code that reads parameters outside a module's forward must not set it."""

    def __post_init__(self) -> None:
        if self.accumulation not in (None, "local", "sharded"):
            raise ValueError(f'accumulation={self.accumulation!r}: give "local", "sharded" or None')
        if self.accumulation_steps is not None and self.accumulation_steps < 1:
            raise ValueError(f"accumulation_steps={self.accumulation_steps}: give 1 or more, or None")
        for name in ("reduce_bucket_numel", "persistence_threshold_numel"):
            value = getattr(self, name)
            if value is not None and value < (1 if name == "reduce_bucket_numel" else 0):
                raise ValueError(f"{name}={value}: give a number of elements, or None to adapt to the model")
        if self.param_dtype is not None and not self.param_dtype.is_floating_point:
            raise ValueError(f"param_dtype={self.param_dtype}: give a floating-point dtype, or None")
