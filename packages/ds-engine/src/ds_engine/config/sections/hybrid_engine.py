"""The section `hybrid_engine`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.support.section import Positive, Section


class HybridEngineConfig(Section):
    """Training and generation with the same weights."""

    enabled: bool = Field(default=False, description="Generate with inference kernels.")
    max_out_tokens: Positive = Field(default=512, description="Tokens at most.")
    inference_tp_size: Positive = Field(default=1, description="Ranks that share a layer in generation.")
    release_inference_cache: bool = Field(default=False, description="Free the cache between rounds.")
    pin_parameters: bool = Field(default=True, description="Keep gathered parameters.")
    tp_gather_partition_size: Positive = Field(default=8, description="Layers gathered at once.")
    enable_cuda_graph: bool = Field(default=False, description="Replay CUDA graphs.")
