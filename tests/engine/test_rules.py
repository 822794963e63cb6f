"""Every row of the table of settings that do not go together."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import ds_engine
import ds_offload
from ds_engine.config import ConfigError, load
from ds_engine.job import Choices, PipelineChoice, choices_of
from ds_engine.rules import RULES, check
from ds_engine.schedules import WarmupLR


def chosen(raw: dict[str, Any], **passed: Any) -> Choices:
    return choices_of(load({"train_batch_size": 4, **raw}), **passed)


OFFLOAD = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
ON_DISK = {"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}
BUDGET = {"zero_optimization": {"stage": 2}, "offload": {"budget": {"host": "1GiB", "nvme_path": "/tmp"}}}
EARLY = {"stage": 1, "offload_optimizer": {"device": "cpu", "overlap_step": True}}

STAGES = PipelineChoice(num_stages=2, schedule="1f1b", parts=(0, 2, 4), rank_of_stage=(0, 1), ties=False)
PIPED: dict[str, Any] = {"pipeline": STAGES}
TIED: dict[str, Any] = {"pipeline": replace(STAGES, ties=True)}
PACKED = {
    "enabled": True,
    "data_sampling": {
        "enabled": True,
        "dynamic_batching": {"enabled": True, "max_tokens": 64, "metrics_path": "m"},
    },
}

# One job for each rule, in the order of the table.
TENSOR = {"tensor_parallel": {"autotp_size": 2}}
BROKEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, {"optimizer": torch.optim.AdamW}),
    ({"optimizer": {"type": "Adam", "params": {"state_dtype": "int8"}}}, {}),
    ({"optimizer": {"type": "Adam", "params": {"split_masters": True}}}, {}),
    (
        {"optimizer": {"type": "Adam", "params": {"split_masters": True}}, "zero_optimization": OFFLOAD},
        {},
    ),
    (
        {
            "optimizer": {"type": "Adam", "params": {"state_dtype": "bf16"}},
            "zero_optimization": OFFLOAD,
            "bf16": {"enabled": True, "bf16_optimizer_states": True},
        },
        {},
    ),
    ({"optimizer": {"type": "LBFGS"}}, {}),
    ({"optimizer": {"type": "SparseAdam"}}, {}),
    ({"zero_optimization": OFFLOAD}, {"optimizer": torch.optim.AdamW}),
    ({"zero_optimization": ON_DISK, "optimizer": {"type": "Adafactor"}}, {}),
    ({**BUDGET, "optimizer": {"type": "AdamW", "params": {"state_dtype": "int8"}}}, {"device_type": "cuda"}),
    ({"zero_optimization": OFFLOAD, "offload": {"budget": {"device": "1GB"}}}, {}),
    ({"zero_optimization": {"stage": 0}, "offload": {"budget": {"device": "1GB"}}}, {}),
    ({**BUDGET, "optimizer": {"type": "Adafactor"}}, {}),
    ({**BUDGET, "integrity": {"checksums": True}}, {}),
    ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True, "rank_invariant": True}}, {}),
    (
        {
            "zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True},
            "integrity": {"checksums": True},
        },
        {},
    ),
    ({"integrity": {"message_checksums": True}, "optimizer": {"type": "OneBitAdam"}}, {}),
    ({"zero_optimization": {"stage": 1}, "local_sgd": {}}, {}),
    ({"optimizer": {"type": "ZeroOneAdam"}, "local_sgd": {}}, {}),
    ({"optimizer": {"type": "OneBitAdam"}, "zero_optimization": {**ON_DISK, "stage": 0}}, {}),
    ({"zero_optimization": ON_DISK, "integrity": {"checksums": True}}, {}),
    ({"zero_optimization": EARLY, "integrity": {"checksums": True}, "bf16": {"enabled": True}}, {}),
    ({"zero_optimization": {**OFFLOAD, "zenflow": {}}, "bf16": {"enabled": True}}, {}),
    ({"zero_optimization": EARLY, "managed_gradient_accumulation": False, "bf16": {"enabled": True}}, {}),
    ({"zero_optimization": EARLY}, {}),
    ({"pipeline": {"stages": 4}}, {}),
    ({"pipeline": {"stages": 4}}, PIPED),
    ({"managed_gradient_accumulation": False}, PIPED),
    ({"zero_optimization": {"stage": 2, "rank_invariant": True}}, PIPED),
    ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, PIPED),
    ({"sequence_parallel_size": 2}, PIPED),
    ({"tensor_parallel": {"autotp_size": 2, "sequence_parallel_norms": True}}, PIPED),
    (BUDGET, PIPED),
    ({"zero_optimization": EARLY, "bf16": {"enabled": True}}, PIPED),
    ({"activation_offload": {"device": "cpu"}}, PIPED),
    ({"flops_profiler": {"enabled": True}}, PIPED),
    ({"progressive_layer_drop": {"enabled": True}}, PIPED),
    ({"data_efficiency": PACKED}, PIPED),
    ({"optimizer": {"type": "OneBitAdam"}}, TIED),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, TIED),
    ({"zero_optimization": {"stage": 1, "accumulation_plan": "sharded"}}, PIPED),
    ({"optimizer": {"type": "Adam"}}, {"optimizer": torch.optim.AdamW}),
    ({"optimizer": {"type": "Adam"}, "scheduler": {"type": "WarmupLR"}}, {"lr_scheduler": WarmupLR}),
    ({**TENSOR, "optimizer": {"type": "Lamb"}}, {}),
    ({**TENSOR, "optimizer": {"type": "OneBitAdam"}, "zero_optimization": {"stage": 0}}, {}),
    ({"sparse_attention": {}, "sequence_parallel_size": 2}, {}),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "nvme"}}}, {}),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, {}),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(RULES)))
def test_each_rule_refuses_its_job_and_says_why(index: int) -> None:
    raw, more = BROKEN[index]
    job = chosen(raw, **more)
    rule = RULES[index]
    assert [r for r in RULES if r.applies(job)] == [rule]
    if rule.refuse:
        with pytest.raises(ConfigError) as caught:
            check(job)
        said = str(caught.value)
    else:
        with pytest.warns(UserWarning, match="has no effect") as warned:
            check(job)
        said = str(warned[0].message)
    assert rule.first in said and rule.second in said and rule.reason in said and rule.remedy in said


@pytest.mark.parametrize(
    ("raw", "more"),
    [
        ({"optimizer": {"type": "Lamb"}, "zero_optimization": {"stage": 2}}, {}),
        ({"optimizer": {"type": "Muon"}, "zero_optimization": {"stage": 3}}, {}),
        ({"optimizer": {"type": "Adam"}, "zero_optimization": OFFLOAD}, {}),
        ({"zero_optimization": OFFLOAD}, {"optimizer": ds_offload.CPUAdam}),
        ({"zero_optimization": EARLY, "bf16": {"enabled": True}, "optimizer": {"type": "Adam"}}, {}),
        ({"zero_optimization": ON_DISK, "optimizer": {"type": "Adam"}}, {}),
        ({"zero_optimization": ON_DISK, "optimizer": {"type": "Muon"}}, {}),
        ({"zero_optimization": ON_DISK, "optimizer": {"type": "Lamb"}}, {}),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, {"device_type": "cuda"}),
        (
            {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 9}},
            {"optimizer": torch.optim.SGD},
        ),
        ({"zero_optimization": {"stage": 2, "overlap_publish": True}}, {"optimizer": torch.optim.SGD}),
        ({"scheduler": {"type": "WarmupLR"}}, {"optimizer": torch.optim.SGD}),
        (BUDGET, {}),
        ({"optimizer": {"type": "RMSprop"}, "zero_optimization": OFFLOAD}, {}),
        ({"optimizer": {"type": "Adam", "params": {"torch_adam": True}}, "zero_optimization": OFFLOAD}, {}),
        ({"optimizer": {"type": "AdamW", "params": {"bias_correction": False}}}, {}),
        (
            {"zero_force_ds_cpu_optimizer": False, "zero_optimization": OFFLOAD},
            {"optimizer": torch.optim.AdamW},
        ),
    ],
)
def test_what_goes_together_passes(raw: dict[str, Any], more: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(chosen(raw, **more))


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage is "auto"'),
        ({"train_batch_size": "auto"}, 'train_batch_size: "auto", and no integration has replaced it'),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}},
            'scheduler.params.total_num_steps is "auto", and no integration has replaced it: set it to the number of '
            "optimizer steps",
        ),
    ],
)
def test_auto_that_has_to_be_a_value_is_refused(raw: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(chosen(raw))
    assert wanted in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        {
            "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
        },
        {"train_micro_batch_size_per_gpu": 4, "train_batch_size": "auto"},
        {"train_batch_size": 4, "gradient_clipping": "auto", "bf16": {"enabled": "auto"}},
        {"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}},
    ],
)
def test_auto_that_has_a_default_takes_it(raw: dict[str, Any]) -> None:
    config = load(raw)
    check(choices_of(config))
    assert config.batch(1).train == 4
    assert config.gradient_clipping == 1.0 and not config.bf16.enabled
    assert config.optimizer is None or config.optimizer.params == {}


def test_mistakes_of_the_configuration_and_of_the_job_are_told_at_once() -> None:
    raw = {
        "train_batch_size": "4",
        "optimizer": {"type": "AdamX", "params": {"lr": "1"}},
        "scheduler": {"type": "W"},
    }
    with pytest.raises(ConfigError) as caught:
        ds_engine.initialize(model=torch.nn.Linear(2, 2), config=raw)
    said = str(caught.value)
    for part in (
        'train_batch_size is "4"',
        '"AdamX": there is no such',
        'params.lr is "1"',
        '"W": there is no such',
    ):
        assert part in said


def test_initialize_asks_the_table() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="closure"):
        ds_engine.initialize(model=model, config={"train_batch_size": 2, "optimizer": {"type": "LBFGS"}})
    with pytest.raises(ConfigError, match="a job has one optimizer"):
        ds_engine.initialize(
            model=model,
            config={"train_batch_size": 2, "optimizer": {"type": "Adam"}},
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        )
