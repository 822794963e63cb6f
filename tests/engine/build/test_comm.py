"""Quantised collectives from the configuration (ZeRO++)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_engine
from ds_engine import ConfigError
from ds_zero import _registry
from harness import ranks

STEPS = 12


def train(zero: dict[str, Any], **more: Any) -> tuple[list[float], int, int]:
    """Returns the losses over all ranks, and the bytes gathered and reduced by this rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64))
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
        "zero_optimization": {"stage3_param_persistence_threshold": 0, **zero},
        "gradient_clipping": 1.0,
        "startup_summary": False,
        **more,
    }
    engine = ds_engine.initialize(model, config)[0]
    comm = _registry.state_of(model).comm
    before = comm.gathered_bytes, comm.reduced_bytes
    losses = []
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(100 * step + dist.get_rank())
        x = torch.randn(8, 64, generator=draw)
        loss = (engine(x) - x.flip(1)).square().mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    gathered, reduced = comm.gathered_bytes - before[0], comm.reduced_bytes - before[1]
    engine.destroy()
    return losses, gathered, reduced


@ranks(2)
def test_weights_and_gradients_are_sent_in_few_bits_and_training_follows() -> None:
    exact, gathered, reduced = train({"stage": 3})
    losses, fewer_gathered, fewer_reduced = train(
        {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True}
    )
    assert losses != exact
    assert losses[-1] == pytest.approx(exact[-1], rel=0.03)
    assert losses[-1] < 0.8 * losses[0]
    assert fewer_gathered < 0.27 * gathered  # 8 of 32 bits, and scales
    assert fewer_reduced < 0.15 * reduced  # 4 of 32 bits, and scales


@ranks(2)
def test_gradients_are_quantised_at_stage_2_where_weights_are_not() -> None:
    exact, gathered, reduced = train({"stage": 2})
    losses, same_gathered, fewer = train(
        {"stage": 2, "zero_quantized_weights": True, "zero_quantized_gradients": True}
    )
    assert same_gathered == gathered
    assert fewer < 0.15 * reduced
    assert losses[-1] == pytest.approx(exact[-1], rel=0.03)


@ranks(4, groups_may_stay=True)
def test_with_secondary_copies_gradients_take_two_hops() -> None:
    exact, _, _ = train({"stage": 3})
    losses, _, _ = train(
        {
            "stage": 3,
            "zero_hpz_partition_size": 2,
            "zero_quantized_weights": True,
            "zero_quantized_gradients": True,
        }
    )
    assert losses != exact
    assert losses[-1] == pytest.approx(exact[-1], rel=0.04)


def test_the_same_training_on_any_number_of_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="what is rounded depends on the number of ranks"):
        train({"stage": 3, "zero_quantized_weights": True, "rank_invariant": True})
