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
    """Modules whose parameters stage 3 gathers all at once, because ranks run different parts of them."""

    classes: Names = Field(
        default_factory=lambda: list(DEFAULT_CLASSES),
        description="Class names of such modules, with or without the Python module.",
    )
    names: Names = Field(default_factory=list, description="Names of such modules in the model.")
    name_suffixes: Names = Field(default_factory=list, description="Endings of the names of such modules.")
