"""The section `sparse_attention`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Positive, Section


class SparseAttentionConfig(Section):
    """Which blocks of the attention matrix are computed."""

    mode: Literal["dense", "fixed", "variable", "bigbird", "bslongformer"] = Field(
        default="fixed", description="The pattern."
    )
    block: Positive = Field(default=16, description="Tokens of a block.")
    different_layout_per_head: bool = Field(default=False, description="Another pattern for each head.")
    num_local_blocks: Positive = Field(default=4, description="Blocks of a local window.")
    num_global_blocks: Positive = Field(default=1, description="Blocks that all attend to.")
    attention: Literal["bidirectional", "unidirectional"] = Field(
        default="bidirectional", description="Whether tokens see what follows."
    )
    horizontal_global_attention: bool = Field(default=False, description="Global blocks attend to all.")
    num_different_global_patterns: Positive = Field(default=1, description="Patterns dealt out to heads.")
    num_random_blocks: Count = Field(default=0, description="Random blocks of a row.")
    local_window_blocks: list[Positive] = Field(
        default_factory=lambda: [4], description="Sizes of local windows."
    )
    global_block_indices: list[Count] = Field(default_factory=lambda: [0], description="Global blocks.")
    global_block_end_indices: list[Count] | None = Field(default=None, description="Their ends, as ranges.")
    num_sliding_window_blocks: Positive = Field(default=3, description="Blocks of a sliding window.")
