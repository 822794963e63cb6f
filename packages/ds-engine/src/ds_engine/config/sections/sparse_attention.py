"""The section `sparse_attention`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Positive, Section


class SparseAttentionConfig(Section):
    """Block-sparse attention: which blocks of the attention matrix are computed."""

    mode: Literal["dense", "fixed", "variable", "bigbird", "bslongformer"] = Field(
        default="fixed", description="Pattern of the computed blocks."
    )
    block: Positive = Field(default=16, description="Side length of a block, in tokens.")
    different_layout_per_head: bool = Field(
        default=False, description="Uses a different pattern for each head."
    )
    num_local_blocks: Positive = Field(default=4, description="Number of blocks in a local window.")
    num_global_blocks: Positive = Field(default=1, description="Number of blocks that all tokens attend to.")
    attention: Literal["bidirectional", "unidirectional"] = Field(
        default="bidirectional",
        description='Whether tokens attend to later tokens ("bidirectional") or not ("unidirectional").',
    )
    horizontal_global_attention: bool = Field(
        default=False, description="Lets global blocks attend to all tokens."
    )
    num_different_global_patterns: Positive = Field(
        default=1, description="Number of patterns of global blocks that heads take turns with."
    )
    num_random_blocks: Count = Field(default=0, description="Number of random blocks in each row.")
    local_window_blocks: list[Positive] = Field(
        default_factory=lambda: [4], description="Numbers of blocks of the local windows."
    )
    global_block_indices: list[Count] = Field(
        default_factory=lambda: [0], description="Indices of the global blocks."
    )
    global_block_end_indices: list[Count] | None = Field(
        default=None,
        description="Indices at which ranges of global blocks end. Default: each range is one block.",
    )
    num_sliding_window_blocks: Positive = Field(
        default=3, description="Number of blocks in a sliding window."
    )
