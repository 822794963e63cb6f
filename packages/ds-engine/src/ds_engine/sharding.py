"""The section `zero_optimization` in ds_zero's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ds_zero
from ds_core.kernels import squared_norm
from ds_engine.config import Batch, DsConfig


def options(settings: DsConfig, batch: Batch, dtypes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `ds_zero.shard`, beside the model, the optimizer and the stage.

    Args:
        dtypes: fields of `ZeroConfig` that `Precision.zero_options` gives.
    """
    zero = settings.zero_optimization
    found: dict[str, Any] = {
        "norms": squared_norm,
        "config": ds_zero.ZeroConfig(
            accumulation=zero.accumulation_plan,
            accumulation_steps=batch.steps,
            **dtypes,
            reduce_bucket_numel=zero.reduce_bucket_size,
            persistence_threshold_numel=zero.stage3_param_persistence_threshold,
            prefetch=zero.stage3_prefetch,
            overlap_publish=zero.overlap_publish and zero.stage in (1, 2),
        ),
    }
    if zero.offload_optimizer.device == "cpu":
        import ds_offload

        found["store"] = ds_offload.HostStore()
    return found
