"""The bytes that a plan predicts for a step are those that the ranks send, also where messages are compressed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_engine
from ds_engine.build.memory.predict import predicted
from harness import ranks

ONE_BIT = {"type": "OneBitAdam", "params": {"lr": 1e-2, "freeze_step": 1}}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64))


def planned_and_sent(zero: dict[str, Any], **more: Any) -> tuple[int, float, Any]:
    """Returns the bytes of one step as planned, as recorded on rank 0, and the plan."""
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage3_param_persistence_threshold": 0, **zero},
        "gradient_clipping": 1.0,
        "startup_summary": False,
        "comms_logger": {"enabled": True},
        **more,
    }
    engine = ds_engine.initialize(model(), config)[0]
    log = engine.roles.comms_log
    assert log is not None
    for _ in range(3):  # the first steps are unlike the others
        log.reset()
        x = torch.randn(4, 64)
        engine.backward((engine(x) - x).square().mean())
        engine.step()
    sent = sum(total.sent_bytes for total in log.log.totals().values())
    made = predicted(engine.job, model(), micro_batch=torch.randn(4, 64))
    engine.destroy()
    return sum(made.sent_bytes.values()), sent, made


@ranks(2)
def test_quantised_weights_and_gradients_are_planned_to_the_byte() -> None:
    exact, sent, _ = planned_and_sent({"stage": 3})
    if dist.get_rank() == 0:
        assert exact == pytest.approx(sent, abs=64)
    fewer, sent, _ = planned_and_sent(
        {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True}
    )
    if dist.get_rank() == 0:
        assert fewer == pytest.approx(sent, abs=64)
        assert fewer < 0.25 * exact


@ranks(4, groups_may_stay=True)
def test_secondary_copies_and_two_hops_are_planned_to_the_byte() -> None:
    planned, sent, _ = planned_and_sent(
        {
            "stage": 3,
            "zero_hpz_partition_size": 2,
            "zero_quantized_weights": True,
            "zero_quantized_gradients": True,
        }
    )
    if dist.get_rank() == 0:
        assert planned == pytest.approx(sent, abs=64)


@ranks(2)
def test_messages_and_residuals_of_one_bit_are_planned() -> None:
    planned, sent, made = planned_and_sent({"stage": 0}, optimizer=ONE_BIT)
    if dist.get_rank() == 0:
        assert planned == pytest.approx(sent, abs=64)
    numel = sum(p.numel() for p in model().parameters())
    _, _, plain = planned_and_sent({"stage": 0})
    residuals = 4 * numel + 4 * numel // 2  # of the worker, and of a half as server
    states = [p.phases[-1].parts["states"] for p in (made, plain)]
    assert states[0] - states[1] == pytest.approx(residuals, rel=0.02)


@ranks(2)
def test_errors_that_are_fed_back_are_planned() -> None:
    zero = {"stage": 2, "zero_quantized_gradients": True}
    _, _, without = planned_and_sent(zero)
    planned, sent, with_errors = planned_and_sent({**zero, "zeropp_loco_param": {}})
    if dist.get_rank() == 0:
        assert planned == pytest.approx(sent, abs=64)
    numel = sum(p.numel() for p in model().parameters())
    more = with_errors.phases[-1].device_bytes - without.phases[-1].device_bytes
    assert more == pytest.approx(4 * numel, rel=0.02)


def frozen_model() -> nn.Module:
    made = model()
    made[0].requires_grad_(False)
    made[2].requires_grad_(False)
    return made


@ranks(2)
def test_frozen_parameters_in_8_bits_are_planned() -> None:
    made, sent = {}, {}
    for int8 in (False, True):
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "zero_quantized_nontrainable_weights": int8,
            },
            "startup_summary": False,
            "comms_logger": {"enabled": True},
        }
        engine = ds_engine.initialize(frozen_model(), config)[0]
        log = engine.roles.comms_log
        assert log is not None
        for _ in range(3):
            log.reset()
            x = torch.randn(4, 64)
            engine.backward((engine(x) - x).square().mean())
            engine.step()
        sent[int8] = sum(total.sent_bytes for total in log.log.totals().values())
        made[int8] = predicted(engine.job, frozen_model(), micro_batch=torch.randn(4, 64))
        engine.destroy()
        if dist.get_rank() == 0:
            assert sum(made[int8].sent_bytes.values()) == pytest.approx(sent[int8], abs=64)
    frozen = sum(p.numel() for p in frozen_model().parameters() if not p.requires_grad)
    fewer = [m.phases[-1].parts["parameters"] for m in (made[False], made[True])]
    assert fewer[0] - fewer[1] == pytest.approx(frozen / 2 * (4 - 1 - 4 / 256), rel=0.05)
    assert sent[True] < 0.6 * sent[False]
