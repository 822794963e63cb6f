"""The section `optimizer`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ds_engine.config.section import Section


class OptimizerConfig(Section):
    """Which optimizer `initialize` builds when none is passed."""

    type: str = Field(
        description="Adam, AdamW, Lamb, Lion, Adagrad or SGD (our kernels), or the name of any class in "
        "torch.optim; case is ignored. "
        "Adam decays weights decoupled, as AdamW does, unless params.adam_w_mode is false."
    )
    params: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the optimizer, for example lr, betas, eps, weight_decay.",
    )
    legacy_fusion: bool = Field(
        default=False, description="An older code path of DeepSpeed's fp16 optimizer; the update is the same."
    )
