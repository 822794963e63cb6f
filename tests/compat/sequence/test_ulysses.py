"""Ulysses under DeepSpeed's names, as Accelerate and Trainer call it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter
from deepspeed.sequence.cross_entropy import vocab_sequence_parallel_cross_entropy
from deepspeed.sequence.layer import DistributedAttention
from deepspeed.utils import groups
from torch import Tensor, nn

import deepspeed
from ds_layers import mean_over_tokens
from harness import ranks

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
    "zero_optimization": {"stage": 3},
    "gradient_clipping": 0.0,
}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=17, use_cache=False, **sizes))  # type: ignore[no-any-return]


def sample(index: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 17, (1, 7), generator=torch.Generator().manual_seed(index))
    return {"input_ids": ids, "labels": ids.clone()}


def loss_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The loss of each rank, weighted with its tokens. Trainer does so by torch's differentiable all-gather, whose
    backward on gloo takes ranks of a group for those of the job.
    """
    loss = model(**inputs, labels=inputs["shift_labels"]).loss
    count = (inputs["shift_labels"] != -100).sum()
    return mean_over_tokens(loss * count, count, groups._get_sequence_parallel_group())


@ranks(4, groups_may_stay=True)
def test_a_model_of_transformers_trains_as_one_process() -> None:
    reference = llama()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5)
    expected = []
    for first in (0, 1):  # each data-parallel group takes the samples of its ranks, one after the other
        loss = torch.stack([reference(**sample(index)).loss for index in (first, first + 2)]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    model = llama()
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=2,
        micro_batch_size=1,
        disable_in_eval=True,
    )
    assert mpu is not None and groups._get_sequence_parallel_world_size() == 2
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG, mpu=mpu)
    assert engine.train_batch_size() == 2
    loader = UlyssesSPDataLoaderAdapter(
        [sample(dist.get_rank())],
        sp_rank=mpu.get_sequence_parallel_rank(),
        sp_group=mpu.get_sequence_parallel_group(),
        sp_world_size=2,
        device="cpu",
    )
    for inputs, want in zip(loader, expected, strict=True):
        loss = loss_of(engine, inputs)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        assert mean.item() / 4 == pytest.approx(want, rel=1e-5)
    engine.eval()
    with torch.no_grad():  # whole sequences on every rank
        torch.testing.assert_close(
            engine(**sample(9)).loss, reference.eval()(**sample(9)).loss, atol=1e-5, rtol=1e-5
        )
    engine.destroy()
    by_names()


def by_names() -> None:
    """`sequence_parallel_size`, `mesh_param`, and the names of deepspeed.sequence."""
    for config, mesh in (({**CONFIG, "sequence_parallel_size": 2}, None), (CONFIG, (2, 2))):
        engine, *_ = deepspeed.initialize(model=nn.Linear(3, 3), config=config, mesh_param=mesh)
        assert engine.train_batch_size() == 2
        assert groups._get_sequence_parallel_rank() == dist.get_rank() % 2
        assert groups._get_data_parallel_world_size() == 2
        engine.destroy()
    group = groups._get_sequence_parallel_group()
    rank = dist.get_rank(group)
    torch.manual_seed(0)
    q, k, v = (torch.randn(8, 1, 4, 4) for _ in range(3))  # (tokens, batch, heads, head_dim)

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
        return nn.functional.scaled_dot_product_attention(*first).permute(2, 0, 1, 3)

    part = slice(4 * rank, 4 * rank + 4)
    out = DistributedAttention(local, group)(q[part], k[part], v[part], 1)
    torch.testing.assert_close(out, local(q, k, v)[part])
    with pytest.raises(ValueError, match="batch_dim_idx=0 with gather_idx=0"):
        DistributedAttention(local, group)(q[part], k[part], v[part], 0)
    logits, target = torch.randn(8, 2, 5), torch.randint(0, 5, (8, 2))
    own = logits[part].clone().requires_grad_()
    losses = vocab_sequence_parallel_cross_entropy(own, target[part], group)
    want = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(8, 2)
    torch.testing.assert_close(losses, want)
    losses.sum().backward()
    torch.testing.assert_close(own.grad.sum(-1), torch.zeros(4, 2), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="3 sequence-parallel ranks do not divide 4 ranks"):
        UlyssesSPAttentionHF.register_with_transformers(None, "sdpa", 3)
