"""The section `zero_optimization.leaf_module`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.support.section import Names, Section

DEFAULT_CLASSES = (
    "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
)


class LeafModuleConfig(Section):
    """Modules whose parameters stage 3 gathers all at once, because what runs inside differs between ranks."""

    classes: Names = Field(
        default_factory=lambda: list(DEFAULT_CLASSES),
        description="Class names, with or without their module.",
    )
    names: Names = Field(default_factory=list, description="Names of modules in the model.")
    name_suffixes: Names = Field(default_factory=list, description="Ends of names of modules.")
