"""The section `compile`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Section


class CompileConfig(Section):
    """DeepCompile: communication inside the compiled graph."""

    deepcompile: bool = Field(default=False, description="Rewrite the graph.")
    autoep_non_moe: bool = Field(default=False, description="Compile around expert layers.")
    free_activation: bool = Field(default=False, description="Free activations early.")
    free_activation_threshold: Count = Field(default=10 * 2**20, description="Bytes of those at least.")
    offload_activation: bool = Field(default=False, description="Move activations to host memory.")
    offload_activation_pin_memory: bool = Field(default=True, description="To page-locked memory.")
    offload_opt_states: bool = Field(default=False, description="Move optimizer states to host memory.")
    offload_parameters: bool = Field(default=False, description="Move parameters to host memory.")
    double_buffer: bool = Field(default=True, description="Two buffers for gradients.")
    symmetric_memory: bool = Field(default=False, description="Gather by symmetric memory.")
    debug_log: bool = Field(default=False, description="Write the graphs.")
    sync_before_reduce: bool = Field(default=False, description="Wait before a reduction.")
    sync_after_reduce: bool = Field(default=False, description="Wait after a reduction.")
    sync_before_allgather: bool = Field(default=False, description="Wait before a gather.")
    sync_after_allgather: bool = Field(default=False, description="Wait after a gather.")
    keep_int_input_tensors: bool = Field(default=True, description="Keep integer inputs for profiling.")
    keep_all_input_tensors: bool = Field(default=False, description="Keep all inputs for profiling.")
    passes: list[Literal["z1", "z3", "autosp", "autotp"]] | None = Field(default=None, description="Passes.")
