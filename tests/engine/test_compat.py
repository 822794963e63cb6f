"""Every row of the table of settings that do not go together."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import ds_engine
from ds_engine.compat import RULES, Job, check
from ds_engine.config import ConfigError, load

OFFLOAD = {"stage": 1, "offload_optimizer": {"device": "cpu"}}

# One job for each rule, in the order of the table.
BROKEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"optimizer": {"type": "LBFGS"}}, {}),
    ({"optimizer": {"type": "SparseAdam"}}, {}),
    ({"optimizer": {"type": "Muon"}, "zero_optimization": {"stage": 1}}, {}),
    ({"optimizer": {"type": "RMSprop"}, "zero_optimization": OFFLOAD}, {}),
    ({"zero_optimization": OFFLOAD}, {"optimizer": "AdamW"}),
    ({"optimizer": {"type": "Adam"}}, {"optimizer": "AdamW"}),
    ({"optimizer": {"type": "Adam"}, "scheduler": {"type": "WarmupLR"}}, {"scheduler_passed": True}),
    ({"optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 2, "stage3_param_persistence_threshold": 9}}, {}),
    ({"optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 3, "overlap_publish": True}}, {}),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}, {}),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(RULES)))
def test_each_rule_refuses_its_job_and_says_why(index: int) -> None:
    raw, more = BROKEN[index]
    job = Job(config=load({"train_batch_size": 4, **raw}), **more)
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
        ({"optimizer": {"type": "Lamb"}}, {}),
        ({"optimizer": {"type": "Adam"}, "zero_optimization": OFFLOAD}, {}),
        ({"zero_optimization": OFFLOAD}, {"optimizer": "CPUAdam", "host_optimizer": True}),
        ({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 9}}, {"optimizer": "SGD"}),
        ({"zero_optimization": {"stage": 2, "overlap_publish": True}}, {"optimizer": "SGD"}),
        ({"scheduler": {"type": "WarmupLR"}}, {"optimizer": "SGD"}),
    ],
)
def test_what_goes_together_passes(raw: dict[str, Any], more: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(Job(config=load({"train_batch_size": 4, **raw}), **more))


def test_initialize_asks_the_table() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="closure"):
        ds_engine.initialize(model=model, config={"train_batch_size": 2, "optimizer": {"type": "LBFGS"}})
    with pytest.raises(ConfigError, match="there can be one optimizer"):
        ds_engine.initialize(
            model=model,
            config={"train_batch_size": 2, "optimizer": {"type": "Adam"}},
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        )
