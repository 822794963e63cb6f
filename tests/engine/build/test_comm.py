"""Quantised collectives from the configuration (ZeRO++)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_engine
import ds_zero
from ds_comm.exchange import LoCoReduceScatter
from ds_comm.frozen import FrozenStore
from ds_engine import ConfigError
from ds_engine.build.comm import _reduces_int4
from ds_engine.config import load
from ds_engine.job import choices_of
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


@ranks(2)
def test_what_gradients_lose_is_fed_back() -> None:
    exact, _, _ = train({"stage": 2})
    losses, _, _ = train(
        {
            "stage": 2,
            "zero_quantized_gradients": True,
            "zeropp_loco_param": {"err_beta": 0.5, "reset_T": 64},
        }
    )
    assert losses != exact
    assert losses[-1] == pytest.approx(exact[-1], rel=0.03)


def test_both_keys_of_the_error_feedback_arrive() -> None:
    loco = {"err_beta": 0.25, "reset_T": 7}
    choices = choices_of(
        load(
            {
                "train_batch_size": 4,
                "zero_optimization": {
                    "stage": 2,
                    "zero_quantized_gradients": True,
                    "zeropp_loco_param": loco,
                },
            }
        )
    )
    made = _reduces_int4(choices, None, 1)  # type: ignore[arg-type]
    assert isinstance(made, LoCoReduceScatter)
    assert (made.err_beta, made.reset_steps) == (0.25, 7)


def lora(freeze: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 64)]
    for layer in layers[:3]:
        layer.requires_grad_(not freeze)
    return nn.Sequential(*layers)


def frozen_config(**zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero},
        "startup_summary": False,
    }


def frozen_batch(step: int) -> torch.Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(step))


@ranks(2)
def test_frozen_parameters_are_kept_and_gathered_in_8_bits() -> None:
    gathered = {}
    for int8 in (False, True):
        model = lora()
        exact = [p.detach().clone() for p in model.parameters()]
        config = frozen_config(zero_quantized_nontrainable_weights=int8)
        config["bf16"] = {"enabled": True}
        engine = ds_engine.initialize(model, config)[0]
        state = _registry.state_of(model)
        before = state.comm.gathered_bytes
        losses = []
        for step in range(4):
            x = frozen_batch(step).bfloat16()
            loss = (engine(x) - x.flip(1)).float().square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        gathered[int8] = state.comm.gathered_bytes - before
        with ds_zero.gathered(model.parameters()):
            values = [p.detach().clone() for p in model.parameters()]
        for value, start in list(zip(values, exact, strict=True))[:4]:
            assert (value.float() - start).abs().max() <= start.abs().max() * (1 / 254 + 1 / 128)
            everywhere = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(everywhere, value)
            assert torch.equal(*everywhere)  # the owner reads what it sends
        if int8:
            store = state.store
            assert isinstance(store, FrozenStore)
            numel = sum(p.numel() for p in exact[:4])
            assert store.num_bytes == pytest.approx(numel / 2 * (1 + 4 / 256), rel=0.01)
            # A plain run with the values that the ranks read is the same training.
            plain = lora().bfloat16()
            with torch.no_grad():
                for p, value in list(zip(plain.parameters(), values, strict=True))[:4]:
                    p.copy_(value)
            x = frozen_batch(0).bfloat16()
            assert (plain(x) - x.flip(1)).float().square().mean().item() == pytest.approx(losses[0], rel=1e-3)
        engine.destroy()
    assert gathered[True] < 0.6 * gathered[False]  # a ninth of the model is trained, and is sent in 16 bits
