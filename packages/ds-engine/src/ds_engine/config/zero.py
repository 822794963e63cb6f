"""The section `zero_optimization`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ds_engine.config.section import Count, Positive, Section

STAGES = {
    0: "nothing is divided",
    1: "optimizer states are divided among ranks",
    2: "optimizer states and gradients are divided",
    3: "optimizer states, gradients and parameters are divided",
}


def _known_stage(stage: int) -> int:
    if stage not in STAGES:
        meaning = "; ".join(f"{number}: {text}" for number, text in STAGES.items())
        raise ValueError(f"there are stages 0 to 3 ({meaning})")
    return stage


class OffloadOptimizerConfig(Section):
    """Where fp32 masters and optimizer states rest, and where the optimizer runs."""

    device: Literal["none", "cpu"] = Field(
        default="none",
        description='"none": on the device of the model. "cpu": in host memory, stepped there by CPU-Adam.',
    )
    pin_memory: bool = Field(
        default=True,
        description="Page-locked host memory beside an accelerator, for faster copies; without one it makes "
        "no "
        "difference. It cannot be turned off yet, and false is answered by a warning.",
    )


class ZeroOptimizationConfig(Section):
    """How the model is divided among data-parallel ranks."""

    stage: Annotated[int, AfterValidator(_known_stage)] = Field(
        default=0, description="; ".join(f"{number}: {text}" for number, text in STAGES.items()) + "."
    )
    offload_optimizer: OffloadOptimizerConfig = Field(
        default_factory=OffloadOptimizerConfig, description="Optimizer states and step on the host."
    )
    reduce_bucket_size: Positive | None = Field(
        default=None,
        description="Elements that one gradient message holds at most. Default: an eighth of the model, "
        "between 2^18 and 2^25.",
    )
    stage3_param_persistence_threshold: Count | None = Field(
        default=None,
        description="Stage 3: parameters of at most so many elements stay whole on every rank. Default: up "
        "to 1e5, as long as those "
        "are within 2% of the model.",
    )
    stage3_prefetch: bool = Field(
        default=True,
        description="Stage 3: gather the parameters of the next module while the present one computes.",
    )
    overlap_publish: bool = Field(
        default=False,
        description="Stages 1 and 2: let step() return while new parameters are still being gathered; "
        "modules wait for them. "
        "Only for code that reads parameters inside modules alone.",
    )
    accumulation_plan: Literal["local", "sharded"] | None = Field(
        default=None,
        description='How the gradients of several micro-batches are summed. "local": whole gradients on each '
        "rank, reduced once at the "
        'boundary. "sharded": reduced every micro-batch, shards are summed. Default: local in stages 0 and '
        "1, sharded in 2 and 3.",
    )
