"""Sections of the configuration that change what is inside of a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ds_engine
from ds_layers.sparse import FixedSparsityConfig
from ds_layers.sparse.plan import token_mask
from harness import ranks
from layers.tensor.test_parallelize import TOKENS, hugging_face


@ranks(1)
def test_a_pattern_of_the_section_becomes_the_attention_of_the_model() -> None:
    section = {"mode": "fixed", "block": 2, "num_local_blocks": 2, "attention": "unidirectional"}
    config = {"train_batch_size": 2, "optimizer": {"type": "SGD"}, "startup_summary": False}
    plain: Any = hugging_face("llama")
    layout = FixedSparsityConfig(4, 2, num_local_blocks=2, attention="unidirectional").make_layout(8)
    mask = torch.where(token_mask(layout, 2, causal=True)[None, :1], 0.0, -1e30)
    want = plain(input_ids=TOKENS, attention_mask=mask).logits
    engine, *_ = ds_engine.initialize(
        model=hugging_face("llama"), config={**config, "sparse_attention": section}
    )
    got = engine(input_ids=TOKENS).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(got, plain(input_ids=TOKENS).logits, atol=1e-4)
    engine.backward(got.square().mean())
    engine.step()
    attention = engine.roles.sparse_attention
    assert attention is not None and attention(*(torch.randn(1, 8, 4, 4) for _ in range(3))).shape == (
        1,
        8,
        4,
        4,
    )
    first = engine(input_ids=TOKENS, use_cache=True)
    with pytest.raises(ValueError, match="1 queries and 9 keys"):
        engine(input_ids=TOKENS[:, :1], past_key_values=first.past_key_values)
    engine.destroy()
