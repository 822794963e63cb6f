"""Patterns of block-sparse attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_layers.sparse import (
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    SparsityConfig,
    VariableSparsityConfig,
    sparsity_of,
)
from ds_layers.sparse.plan import plan_blocks


def drawn(config: SparsityConfig, blocks: int, head: int = 0) -> list[str]:
    layout = config.make_layout(blocks * config.block)
    assert layout.shape == (config.num_heads, blocks, blocks) and layout.dtype == torch.int64
    return ["".join("x" if one else "." for one in row) for row in layout[head].tolist()]


def test_fixed() -> None:
    assert drawn(FixedSparsityConfig(2, 4, num_local_blocks=2), 5) == [
        "xx.xx",
        "xx.xx",
        ".xxxx",
        ".xxxx",
        ".x.xx",
    ]
    causal = FixedSparsityConfig(2, 4, num_local_blocks=2, attention="unidirectional")
    assert drawn(causal, 4) == ["x...", "xx..", ".xx.", ".xxx"]
    wide = FixedSparsityConfig(1, 4, num_local_blocks=2, horizontal_global_attention=True)
    assert drawn(wide, 4) == ["xx.x", "xxxx", ".xxx", "xxxx"]
    heads = FixedSparsityConfig(
        4, 4, different_layout_per_head=True, num_local_blocks=2, num_different_global_patterns=2
    )
    assert drawn(heads, 4, head=1) == ["xxx.", "xxx.", "x.xx", "x.xx"]
    assert drawn(heads, 4, head=2) == drawn(heads, 4, head=0) != drawn(heads, 4, head=1)


def test_windows_and_globals() -> None:
    assert drawn(LocalSlidingWindowSparsityConfig(1, 4), 4) == ["x...", "xx..", ".xx.", "..xx"]
    longformer = BSLongformerSparsityConfig(1, 4, global_block_indices=[3])
    assert drawn(longformer, 5) == ["xx.x.", "xxxx.", ".xxx.", "xxxxx", "...xx"]
    variable = VariableSparsityConfig(
        1, 4, local_window_blocks=[1, 2], global_block_indices=[1], global_block_end_indices=[2]
    )
    assert drawn(variable, 5) == ["xx...", ".xx..", ".xx..", ".x.xx", ".x.xx"]
    assert drawn(DenseSparsityConfig(1, 4), 2) == ["xx", "xx"]


def test_random_blocks_are_the_same_everywhere() -> None:
    make: Any = lambda **more: BigBirdSparsityConfig(2, 4, num_random_blocks=2, **more).make_layout(48)  # noqa: E731
    layout = make(different_layout_per_head=True)
    assert torch.equal(layout, make(different_layout_per_head=True)) and not torch.equal(layout[0], layout[1])
    assert not torch.equal(layout, make(different_layout_per_head=True, seed=1))
    assert (
        bool((make()[0, 1:].sum(-1) >= 3).all()) and bool(make()[:, 0].all()) and bool(make()[:, :, 0].all())
    )
    causal = make(attention="unidirectional")
    assert torch.equal(causal, causal.tril()) and bool(causal.diagonal(dim1=1, dim2=2).all())


def test_what_is_refused() -> None:
    for match, build in (
        ("not a multiple of num_global_blocks 3", lambda: FixedSparsityConfig(1, num_global_blocks=3)),
        ("needs different_layout_per_head", lambda: FixedSparsityConfig(1, num_different_global_patterns=2)),
        ("a window has 4 places", lambda: FixedSparsityConfig(1, 16, True, num_different_global_patterns=5)),
        ("attention 'both'", lambda: BigBirdSparsityConfig(1, attention="both")),
        (
            "needs bidirectional",
            lambda: FixedSparsityConfig(1, attention="unidirectional", horizontal_global_attention=True),
        ),
        ("20 tokens are not a multiple", lambda: DenseSparsityConfig(1).make_layout(20)),
        ("more than the 2 blocks", lambda: BigBirdSparsityConfig(1).make_layout(32)),
        ("2 global_block_indices and 1", lambda: VariableSparsityConfig(1, 16, False, 0, [4], [0, 1], [2])),
        ("begins at 2 and ends at 2", lambda: BSLongformerSparsityConfig(1, 16, False, 3, [2], [2])),
        ("mode 'odd'", lambda: sparsity_of("odd", 2)),
        ("num_heads 0", lambda: DenseSparsityConfig(0)),
        ("has no pattern", lambda: SparsityConfig(1).make_layout(16)),
    ):
        with pytest.raises((ValueError, NotImplementedError), match=match):
            build()
    made = sparsity_of("bigbird", 2, block=8, num_random_blocks=0, num_local_blocks=4)
    assert isinstance(made, BigBirdSparsityConfig) and made.block == 8 and made.num_random_blocks == 0
    with pytest.raises(ValueError, match="block row 1 of head 0 has no blocks, so tokens 4 to 7"):
        plan_blocks(torch.tensor([[[1, 0], [0, 0]]]), 4, causal=False)
