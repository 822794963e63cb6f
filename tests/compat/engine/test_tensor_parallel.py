"""Layers that are cut among ranks, under DeepSpeed's names."""

from __future__ import annotations

import torch
from deepspeed.ops.sparse_attention import FixedSparsityConfig, SparseSelfAttention
from deepspeed.utils import groups

import deepspeed
from harness import ranks
from layers.tensor.test_parallelize import hugging_face, loss_of

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW"},
    "zero_optimization": {"stage": 1},
}


@ranks(2, groups_may_stay=True)
def test_tp_model_init_cuts_the_model_in_initialize() -> None:
    want = loss_of(hugging_face("llama"))
    model = deepspeed.tp_model_init(hugging_face("llama"), tp_size=2, dtype=torch.float32)
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
    assert engine.train_batch_size() == 2 and groups._get_model_parallel_world_size() == 2
    loss = loss_of(engine)
    torch.testing.assert_close(loss, want)
    engine.backward(loss)
    engine.step()
    assert loss_of(engine) < loss
    engine.destroy()


def test_sparse_attention_has_its_old_names() -> None:
    q = torch.randn(1, 2, 32, 8)
    module = SparseSelfAttention(
        sparsity_config=FixedSparsityConfig(num_heads=2, block=8, num_local_blocks=2)
    )
    assert module(q, q, q).shape == q.shape
