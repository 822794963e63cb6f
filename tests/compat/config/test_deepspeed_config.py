"""Configurations that DeepSpeed reads and public projects ship, in small: accepted, or refused for a reason.

Each stands for a kind of file; `docs/benchmarks/configs.md` has what became of the files themselves.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.precision_config import DeepSpeedFP16Config
from torch import nn

import deepspeed
from harness import ranks

BATCH: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2}
ADAMW: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}

# Kind -> what stands in the file beside a batch size, and a part of what is said about it: "" for nothing at all.
ACCEPTED: dict[str, tuple[dict[str, Any], str]] = {
    "a comment": ({"_comment": "for small clusters"}, '"_comment"'),
    "a comment as in C": ({"//": "see the wiki"}, '"//"'),
    "a key of a launcher": ({"cuda_visible_devices": "0"}, '"cuda_visible_devices"'),
    "a section of an older version": ({"comms_config": {"verbose": False}}, '"comms_config"'),
    "a key of another program": ({"wandb_project": "mine", "steps": 4}, '"wandb_project", "steps"'),
    "keys with dots": (
        {"zero_optimization.reduce_bucket_size": 0.9},
        'inside of the section "zero_optimization"',
    ),
    "an optimizer without a type": ({"optimizer": {"type": None, "params": {"lr": "auto"}}}, ""),
    "the address of a schema": ({"$schema": "ds_config.schema.json"}, ""),
    "switches of compilation": (
        {"compile": {"disable": False, "backend": "inductor"}},
        '"compile.disable" is ignored',
    ),
    "asynchronous steps": (
        {
            "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "cpu"},
                "zenflow": {"topk_ratio": 0.1},
            },
            **ADAMW,
        },
        "all columns are updated in every step",
    ),
    "parameters on the host at stage 0": (
        {"zero_optimization": {"stage": 0, "offload_param": {"device": "cpu"}}, **ADAMW},
        "whole on every rank",
    ),
    "parameters on the host of a machine without accelerator": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}, **ADAMW},
        "in host memory already",
    ),
    "a factor beside prescaling": (
        {"prescale_gradients": True, "gradient_predivide_factor": 8, **ADAMW},
        "",
    ),
    "moments without correction": (
        {"optimizer": {"type": "Lamb", "params": {"lr": 1e-2, "bias_correction": False, "max_coeff": 0.3}}},
        "",
    ),
    "torch's Adam on the host": (
        {
            "optimizer": {"type": "Adam", "params": {"torch_adam": True, "lr": 1e-2}},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        },
        "",
    ),
    "SGD on the host": (
        {
            "optimizer": {"type": "SGD", "params": {"lr": 1e-2}},
            "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        },
        "",
    ),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt key": ({"gradient_clip": 1.0}, 'did you mean "gradient_clipping"'),
    "a misspelt section": ({"zero_optimisation": {"stage": 2}}, 'did you mean "zero_optimization"'),
    "a number in quotes": ({"optimizer": {"type": "Adam", "params": {"lr": "3e-4"}}}, "remove the quotes"),
    "pruning": (
        {"compression_training": {"sparse_pruning": {"shared_parameters": {"enabled": True}}}},
        "ds-layers will add",
    ),
    "a template": ({"train_batch_size": "GB_SIZE"}, "it must be an integer"),
    "a removed feature": ({"eigenvalue": {"enabled": True}}, "ds does not support"),
    "kernels in place of layers": (
        {"tensor_parallel": {"replace_with_kernel_inject": True}},
        "ds-layers will add",
    ),
    "no batch size": ({"train_micro_batch_size_per_gpu": None, "model": "x"}, "set train_batch_size"),
}


def trained(config: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)
    net = nn.Linear(3, 3)
    engine, *_ = deepspeed.initialize(
        model=net, model_parameters=net.parameters(), config={"startup_summary": False, **config}
    )
    for _ in range(2):
        loss = engine(torch.ones(2, 3)).square().sum()
        if config.get("optimizer", {}).get("type") is not None:
            engine.backward(loss)
            engine.step()
    engine.destroy()
    return loss.detach()


@ranks(1)
@pytest.mark.parametrize("kind", ACCEPTED)
def test_it_is_accepted_and_what_is_ignored_is_said(kind: str) -> None:
    raw, said = ACCEPTED[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained({**BATCH, **raw})
    texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert sum(said in text for text in texts) == 1 if said else texts == [], texts


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_with_the_reason(kind: str) -> None:
    raw, reason = REFUSED[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DeepSpeedConfigError) as caught:
            DeepSpeedConfig({**BATCH, **raw})
    assert reason in str(caught.value)


@ranks(1)
def test_a_factor_beside_prescaling_changes_nothing() -> None:
    config = {**BATCH, **ADAMW, "prescale_gradients": True}
    assert torch.equal(trained(config), trained({**config, "gradient_predivide_factor": 8.0}))


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), 0, -1])
@pytest.mark.parametrize("name", ["min_loss_scale", "loss_scale_window", "hysteresis"])
def test_scales_are_positive_numbers(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        DeepSpeedFP16Config(enabled=True, **{name: value})
    with pytest.raises(DeepSpeedConfigError, match=rf"fp16\.{name} is "):
        DeepSpeedConfig({**BATCH, "fp16": {"enabled": True, name: value}})
