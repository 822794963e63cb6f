"""Block-sparse attention equals dense attention with a mask, for every pattern and backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_core import _native
from ds_layers.sparse import (
    BlockSparseAttention,
    FixedSparsityConfig,
    SparseAttentionUtils,
    SparseSelfAttention,
    sparsity_of,
)

PATTERNS: list[dict[str, Any]] = [
    {"mode": "dense"},
    {"mode": "fixed", "num_local_blocks": 2, "attention": "unidirectional"},
    {
        "mode": "fixed",
        "num_local_blocks": 2,
        "num_different_global_patterns": 2,
        "different_layout_per_head": True,
    },
    {
        "mode": "variable",
        "num_random_blocks": 1,
        "local_window_blocks": [1, 2],
        "different_layout_per_head": True,
    },
    {"mode": "bigbird"},
    {"mode": "bslongformer", "attention": "unidirectional"},
    {"mode": "local_sliding_window"},
]


def tensors(tokens: int, kv_heads: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens + kv_heads)
    return [
        torch.randn(2, tokens, heads, 16, generator=generator).to(dtype)
        for heads in (4, kv_heads, kv_heads, 4)
    ]


def results(
    attention: BlockSparseAttention, own: list[Tensor], *, gradients: bool = True, **options: Any
) -> list[Tensor]:
    if not gradients:
        with torch.no_grad():
            return [attention(*own[:3], **options)]
    q, k, v = (x.clone().requires_grad_() for x in own[:3])
    out = attention(q, k, v, **options)
    return [out, *torch.autograd.grad(out, (q, k, v), own[3])]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_pattern_is_dense_attention_with_a_mask() -> None:
    lengths = torch.tensor([75, 31])
    for number, pattern in enumerate(PATTERNS):
        for backend in ("native", "blocks", "flex"):
            if backend == "native" and not _native.has_native():
                continue
            if backend == "flex" and number not in (1, 4):
                continue  # the whole matrix, where it is not compiled
            for tokens, kv_heads, causal, padded in (
                (80, 4, False, False),
                (75, 2, False, True),
                (75, 1, True, False),
            ):
                make = lambda heads, own=pattern: sparsity_of(num_heads=heads, block=16, **own)  # noqa: E731
                padding = torch.arange(tokens) < lengths[:, None] if padded else None
                own = tensors(tokens, kv_heads)
                if padding is not None:  # queries that are padding may have nothing to attend to
                    own[3][~padding] = 0
                options: dict[str, Any] = {
                    "gradients": backend != "flex",
                    "causal": causal,
                    "padding": padding,
                    "scale": 0.3,
                }
                want = results(BlockSparseAttention(make, backend="reference"), own, **options)
                got = results(BlockSparseAttention(make, backend=backend), own, **options)  # type: ignore[arg-type]
                if padding is not None:
                    want[0], got[0] = (x[padding] for x in (want[0], got[0]))
                for a, b in zip(got, want, strict=True):
                    torch.testing.assert_close(
                        a, b, atol=2e-5, rtol=1e-4, msg=f"{pattern} {backend} {tokens} {kv_heads}"
                    )


def test_unidirectional_patterns_do_not_see_later_tokens_within_a_block() -> None:
    attention = BlockSparseAttention(FixedSparsityConfig(4, 16, attention="unidirectional"))
    q, k, v, _ = tensors(32, 4)
    out = attention(q, k, v)
    k[:, 5:], v[:, 5:] = 9.0, 9.0
    assert torch.equal(attention(q, k, v)[:, :5], out[:, :5])
    assert attention.density(4, 64) == 10 / 16


def test_other_dtypes_and_sizes_have_a_backend() -> None:
    def make_of(block: int) -> Any:
        return lambda heads: sparsity_of("bigbird", heads, block=block)

    # Blocks of 16 have a native kernel in 16 bits, but none in fp64.
    for dtype, block, bound in (
        (torch.bfloat16, 8, 0.03),
        (torch.bfloat16, 16, 0.01),
        (torch.float16, 16, 2e-3),
        (torch.float64, 16, 1e-10),
    ):
        own, make = tensors(40, 2, dtype), make_of(block)
        wide = [x if dtype == torch.float64 else x.float() for x in own]
        want = results(BlockSparseAttention(make, backend="reference"), wide)
        for a, b in zip(results(BlockSparseAttention(make), own), want, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.to(b.dtype), b, atol=bound, rtol=bound)
    with pytest.raises(ValueError, match="for 4 heads, and the queries have 2"):
        BlockSparseAttention(FixedSparsityConfig(4, 8))(*(x[:, :, :2] for x in own[:3]))
    with pytest.raises(ValueError, match="backend 'odd'"):
        BlockSparseAttention(make, backend="odd")  # type: ignore[arg-type]


def test_the_module_has_deepspeeds_masks() -> None:
    own = [x.transpose(1, 2) for x in tensors(64, 4)[:3]]
    module = SparseSelfAttention(FixedSparsityConfig(4, 16, num_local_blocks=2))
    out = module(*own)
    keep = torch.ones(2, 64)
    keep[1, 40:] = 0
    added = module(*own, key_padding_mask=(1 - keep) * -10000)
    torch.testing.assert_close(added[0], out[0])
    assert not torch.allclose(added[1], out[1])
    other = SparseSelfAttention(FixedSparsityConfig(4, 16, num_local_blocks=2), key_padding_mask_mode="mul")
    torch.testing.assert_close(other(*own, key_padding_mask=keep), added)
    everything = torch.ones(64, 64)
    torch.testing.assert_close(module(*own, attn_mask=everything), out, atol=1e-5, rtol=1e-4)
    triangle = SparseSelfAttention(FixedSparsityConfig(4, 16, num_local_blocks=2, attention="unidirectional"))
    torch.testing.assert_close(
        module(*own, attn_mask=everything.tril()), triangle(*own), atol=1e-5, rtol=1e-4
    )
    bias = torch.randn(64, 64)
    assert not torch.allclose(module(*own, rpe=bias), out)
    with pytest.raises(ValueError, match="60 tokens are not a multiple of the block size 16"):
        module(*(x[:, :, :60] for x in own))
    with pytest.raises(ValueError, match="attn_mask_mode 'or'"):
        SparseSelfAttention(attn_mask_mode="or")


def test_padding_to_blocks_and_longer_position_embeddings() -> None:
    ids = torch.arange(10).view(2, 5)
    missing, padded, mask, kinds, positions, embedded = SparseAttentionUtils.pad_to_block_size(
        4, ids, torch.ones(2, 5), None, None, None, 9, None
    )
    assert missing == 3 and padded is not None and padded[0].tolist() == [0, 1, 2, 3, 4, 9, 9, 9]
    assert mask is not None and mask.sum() == 10 and kinds is positions is embedded is None
    assert SparseAttentionUtils.unpad_sequence_output(missing, padded).shape == (2, 5)
    embedding = nn.Embedding(10, 3)
    longer = SparseAttentionUtils.pad_to_block_size(4, None, None, None, None, embedding(ids), 9, embedding)
    assert longer[5] is not None and torch.equal(longer[5][:, 5:], embedding(torch.full((2, 3), 9)))
    with pytest.raises(ValueError, match="pass input_ids or inputs_embeds"):
        SparseAttentionUtils.pad_to_block_size(4, None, None, None, None, None, 0, None)

    from layers.tensor.test_parallelize import hugging_face

    model: Any = hugging_face("gpt2")
    before = model.transformer.wpe.weight.detach().clone()
    SparseAttentionUtils.extend_position_embedding(model, 40)
    after = model.transformer.wpe.weight
    assert (
        after.shape == (40, 16)
        and torch.equal(after[16:32], before)
        and model.config.max_position_embeddings == 40
    )
    assert model(input_ids=torch.zeros(1, 40, dtype=torch.long)).logits.shape == (1, 40, 31)
    with pytest.raises(ValueError, match="has 40 positions already"):
        SparseAttentionUtils.extend_position_embedding(model, 40)
    with pytest.raises(ValueError, match="no learned position embeddings"):
        SparseAttentionUtils.extend_position_embedding(nn.Linear(2, 2), 4)
