"""The section `optimizer`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ds_engine.config.support.section import Section


class OptimizerConfig(Section):
    """Which optimizer `initialize` builds when none is passed."""

    type: str = Field(
        description="Name of the optimizer: Adam, AdamW, Lamb, Lion, Adagrad, Muon, SGD, MuAdam, MuAdamW or "
        "MuSGD (kernels of ds-core), OneBitAdam, ZeroOneAdam, OneBitLamb, ShardedOneBitAdam "
        "or ShardedOneBitLamb (ds-comm), or any class in "
        "torch.optim. Case is ignored. Adam decouples weight decay, as AdamW does, unless params.adam_w_mode is false."
    )
    params: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the optimizer, for example lr, betas, eps and weight_decay. With "
        "offload_optimizer, Adam, AdamW, Adagrad, Lion and SGD also take state_dtype: fp32 (the default), bf16 with "
        "stochastic rounding, or, for Adam and AdamW, int8, which is one byte for each moment and element; and with "
        "bf16.enabled, split_masters: true stores fp32 masters as bf16 parameters and 16 more bits.",
    )
    legacy_fusion: bool = Field(
        default=False,
        description="Selects an older implementation of DeepSpeed's fp16 optimizer with the same update.",
    )
