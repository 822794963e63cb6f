"""What of a configuration is read as DeepSpeed reads it, and not as ds_engine does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime.precision_config import DeepSpeedFP16Config
from torch import nn

import deepspeed
from harness import ranks


@pytest.mark.parametrize("section", [{"enabled": False}, {"enabled": True, "loss_scale": 128}])
@pytest.mark.parametrize("name", ["loss_scale_window", "hysteresis", "min_loss_scale"])
def test_settings_of_a_dynamic_scale_are_passed_over_where_there_is_none(
    section: dict[str, Any], name: str
) -> None:
    raw = {"train_batch_size": 1, "fp16": {**section, name: 0}}
    assert deepspeed.DeepSpeedConfig(raw).raw == raw
    assert getattr(DeepSpeedFP16Config(**raw["fp16"]), name) == 0
    dynamic = {"enabled": True, name: 0}
    with pytest.raises(deepspeed.DeepSpeedConfigError, match=name):
        deepspeed.DeepSpeedConfig({"train_batch_size": 1, "fp16": dynamic})
    with pytest.raises(ValueError, match=f"{name} is 0: a dynamic loss scale needs a positive number"):
        DeepSpeedFP16Config(**dynamic)


@pytest.mark.parametrize("value", [[], {}, None, True])
def test_a_loss_scale_is_a_number(value: Any) -> None:
    with pytest.raises(ValueError, match="must be a number"):
        DeepSpeedFP16Config(loss_scale=value)


@ranks(2)
@pytest.mark.parametrize(
    ("section", "kept"),
    [({}, True), ({"stage3_param_persistence_threshold": "auto"}, True)]
    + [({key: 10}, False) for key in ("stage3_param_persistence_threshold", "param_persistence_threshold")],
)
def test_parameters_of_stage_3_up_to_the_threshold_are_readable(section: dict[str, Any], kept: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(30, 30)
    engine = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "Adam"},
            "zero_optimization": {"stage": 3, **section},
            "startup_summary": False,
        },
    )[0]
    for _ in range(2):
        assert bool(model.weight.isnan().any()) != kept
        engine.backward(engine(torch.ones(1, 30)).sum())
        engine.step()
    engine.destroy()
