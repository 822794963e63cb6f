"""The section `compile`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Section


class CompileConfig(Section):
    """DeepCompile: collectives inside the graph of torch.compile."""

    deepcompile: bool = Field(default=False, description="Inserts collectives into the compiled graph.")
    autoep_non_moe: bool = Field(default=False, description="Compiles the layers around expert layers.")
    free_activation: bool = Field(
        default=False, description="Frees activations before backward is done with their graph."
    )
    free_activation_threshold: Count = Field(
        default=10 * 2**20, description="Size from which activations are freed early, in bytes."
    )
    offload_activation: bool = Field(default=False, description="Moves activations to host memory.")
    offload_activation_pin_memory: bool = Field(
        default=True, description="Uses page-locked host memory for activations."
    )
    offload_opt_states: bool = Field(default=False, description="Moves optimizer states to host memory.")
    offload_parameters: bool = Field(default=False, description="Moves parameters to host memory.")
    double_buffer: bool = Field(
        default=True,
        description="Uses two gradient buffers, so that one is filled while the other is reduced.",
    )
    symmetric_memory: bool = Field(
        default=False, description="Gathers parameters through torch's symmetric memory."
    )
    debug_log: bool = Field(default=False, description="Writes the compiled graphs to files.")
    sync_before_reduce: bool = Field(
        default=False, description="Synchronises the device before each reduction."
    )
    sync_after_reduce: bool = Field(
        default=False, description="Synchronises the device after each reduction."
    )
    sync_before_allgather: bool = Field(
        default=False, description="Synchronises the device before each all-gather."
    )
    sync_after_allgather: bool = Field(
        default=False, description="Synchronises the device after each all-gather."
    )
    keep_int_input_tensors: bool = Field(
        default=True, description="Keeps integer inputs of the graph for its profile."
    )
    keep_all_input_tensors: bool = Field(
        default=False, description="Keeps all inputs of the graph for its profile."
    )
    passes: list[Literal["z1", "z3", "autosp", "autotp"]] | None = Field(
        default=None,
        description="Passes that change the graph, in their order. Default: those of the ZeRO stage.",
    )
