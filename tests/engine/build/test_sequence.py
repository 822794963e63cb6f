"""`sequence_parallel_size`: the training of one process, at every stage, with a model of Transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_engine
from ds_engine.build.topology import arranged
from ds_engine.config import ConfigError, load
from ds_layers import (
    SequenceBatches,
    SequenceParallelAttention,
    register_with_transformers,
    sequence_parallel_cross_entropy,
)
from harness import ranks

TOKENS = 13  # not a multiple of two


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    return LlamaForCausalLM(  # type: ignore[no-any-return]
        LlamaConfig(
            vocab_size=31,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            use_cache=False,
        )
    )


def batch(step: int, sample: int) -> dict[str, Tensor]:
    """One sample; in step 0, the labels of sample 1 count only where one of its two ranks has no tokens."""
    tokens = torch.randint(0, 31, (1, TOKENS), generator=torch.Generator().manual_seed(10 * step + sample))
    labels = tokens.clone()
    if (step, sample) == (0, 1):
        labels[:, :9] = -100
    return {"input_ids": tokens, "labels": labels}


def reference(steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Two samples a step: the mean over samples of the mean over tokens, clipped."""
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(steps):
        loss = torch.stack([model(**batch(step, sample)).loss for sample in range(2)]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, copy.deepcopy(model.state_dict())


def config(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "startup_summary": False,
        **more,
    }


@ranks(4, groups_may_stay=True)
def test_two_by_two_ranks_train_as_one_process() -> None:
    steps = 3
    losses, weights = reference(steps)
    for stage in range(4):
        model = llama()
        engine, *_ = ds_engine.initialize(model=model, config=config(stage, sequence_parallel_size=2))
        topology = engine.topology
        assert (topology.data.size, topology.sequence.size, engine.batch.micro) == (2, 2, 1)
        assert topology.sequence.index == dist.get_rank() % 2
        group = engine.roles.sequence_group
        register_with_transformers(SequenceParallelAttention(group), model=model)
        own = [batch(step, topology.data.index) for step in range(steps)]
        for step, part in enumerate(SequenceBatches(own, group, shared=True)):
            assert part["input_ids"].shape[1] == 7
            labels = part.pop("shift_labels")
            loss = sequence_parallel_cross_entropy(engine(**part).logits, labels, group)
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            assert mean.item() / 4 == pytest.approx(losses[step], rel=1e-5), f"stage {stage}"
        engine.destroy()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(
                value, weights[name], atol=2e-6, rtol=1e-5, msg=f"stage {stage} {name}"
            )


def test_a_size_that_does_not_fit_is_refused() -> None:
    settings = load(config(1, sequence_parallel_size=3))
    with pytest.raises(ConfigError, match="sequence_parallel_size 3 does not divide 4 ranks"):
        arranged(settings, 0, 4)
    settings = load(
        config(3, sequence_parallel_size=2) | {"zero_optimization": {"stage": 3, "mics_shard_size": 2}}
    )
    topology = arranged(settings, 5, 8)
    assert topology.sizes() == {"replicate": 2, "data": 2, "sequence": 2}
    assert (topology.replicate.index, topology.data.index, topology.sequence.index) == (1, 0, 1)
    assert topology.shards.index == 1 and topology.samples.index == 2
