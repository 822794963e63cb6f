"""The section `hybrid_engine`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.support.section import Positive, Section


class HybridEngineConfig(Section):
    """Training and generation with the same weights, for reinforcement learning."""

    enabled: bool = Field(
        default=False, description="Generates with inference kernels between training steps."
    )
    max_out_tokens: Positive = Field(
        default=512, description="Maximum number of tokens of a prompt and its answer."
    )
    inference_tp_size: Positive = Field(
        default=1, description="Number of tensor-parallel ranks during generation."
    )
    release_inference_cache: bool = Field(
        default=False, description="Frees the cache of keys and values after each generation."
    )
    pin_parameters: bool = Field(
        default=True, description="Keeps gathered parameters in memory between generations."
    )
    tp_gather_partition_size: Positive = Field(
        default=8, description="Number of layers that are gathered at once."
    )
    enable_cuda_graph: bool = Field(default=False, description="Replays CUDA graphs during generation.")
