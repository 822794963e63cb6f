"""ds-layers for an engine: block-sparse attention, as configured."""

from __future__ import annotations

from torch import nn

from ds_engine.config.sections.sparse_attention import SparseAttentionConfig
from ds_engine.interfaces import SparseAttention


def sparse_attention(section: SparseAttentionConfig | None, model: nn.Module) -> SparseAttention | None:
    """Returns the attention function of the section `sparse_attention`; None without it. A model of Transformers uses
    it from then on, with its own mask of padding.
    """
    if section is None:
        return None
    from ds_layers import register_with_transformers
    from ds_layers.sparse import BlockSparseAttention, sparsity_of

    options = section.model_dump()
    attention = BlockSparseAttention(lambda heads: sparsity_of(num_heads=heads, **options))
    if hasattr(model, "config") and hasattr(model, "set_attn_implementation"):
        register_with_transformers(attention.for_transformers, model=model)
    return attention
