"""Block-sparse attention: patterns, kernels, and modules."""

from ds_layers.sparse.attention import Backend, BlockSparseAttention, SparseSelfAttention, sparsity_of
from ds_layers.sparse.layouts import (
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    SparsityConfig,
    VariableSparsityConfig,
)
from ds_layers.sparse.utils import SparseAttentionUtils

__all__ = [
    "BSLongformerSparsityConfig",
    "Backend",
    "BigBirdSparsityConfig",
    "BlockSparseAttention",
    "DenseSparsityConfig",
    "FixedSparsityConfig",
    "LocalSlidingWindowSparsityConfig",
    "SparseAttentionUtils",
    "SparseSelfAttention",
    "SparsityConfig",
    "VariableSparsityConfig",
    "sparsity_of",
]
