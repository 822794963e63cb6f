"""A job is described once: `initialize`, `plan` and `verify` cannot disagree about it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import ds_engine
import ds_zero
from ds_engine.build import verify as verifying
from ds_engine.build.memory.plan import Planned
from ds_engine.build.topology import arranged
from ds_engine.config import load
from ds_engine.job import choices_of, describe
from engine import jobs

SECTIONS: list[dict[str, Any]] = [
    {"type": name, "params": {"lr": 0.01}}
    for name in ("Adam", "AdamW", "Adagrad", "Lamb", "Lion", "SGD", "RMSprop", "NAdam", "Adafactor", "Muon")
] + [
    {"type": "AdamW", "params": {"lr": 0.01, "betas": [0.8, 0.9], "weight_decay": 0.1}},
    {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True, "adam_w_mode": False}},
    {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9, "foreach": False}},
    {"type": "Muon", "params": {"muon_lr": 0.02, "adam_lr": 1e-3, "weight_decay": 0.1}},
]
MORE: list[dict[str, Any]] = [
    {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
    {"bf16": {"enabled": True, "bf16_optimizer_states": True}, "optimizer": SECTIONS[4]},
    {"bf16": {"bf16_optimizer_states": True}},
    {"fp16": {"enabled": True}},
    {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    {"zero_optimization": {"stage": 3}, "gradient_clipping": 0.5},
]
CONFIGS = [{"optimizer": section} for section in SECTIONS] + MORE


class Tables(nn.Module):
    """An embedding and a head, which Muon leaves to AdamW, and a frozen parameter between the others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.still = nn.Linear(4, 4).requires_grad_(False)
        self.inner = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.inner(self.still(self.embed(tokens)))).float().square().mean()  # type: ignore[no-any-return]


def seen(optimizer: Optimizer) -> tuple[object, ...]:
    """What tells two optimizers apart: class, dtype of states, and each group's options and shapes in order."""
    groups = [
        ({k: v for k, v in group.items() if k != "params"}, [tuple(p.shape) for p in group["params"]])
        for group in optimizer.param_groups
    ]
    return type(optimizer), getattr(optimizer, "state_dtype", None), groups


class Stop(Exception):
    """Enough was seen."""


def given_to(target: object, name: str, run: Callable[[], object], read: Callable[..., Any]) -> Any:
    """What `run` calls `target.name` with; the call itself does not happen."""
    caught: list[Any] = []

    def stand_in(*args: Any, **kwargs: Any) -> None:
        caught.append(read(*args, **kwargs))
        raise Stop

    with mock.patch.object(target, name, stand_in), pytest.raises(Stop):
        run()
    return caught[0]


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_initialize_plan_and_verify_see_the_same_optimizer(number: int) -> None:
    settings = load(jobs.config(**{"zero_optimization": {"stage": 1}, "scheduler": None, **CONFIGS[number]}))
    model = Tables()
    initialized = given_to(
        ds_zero, "shard", lambda: ds_engine.initialize(model, settings), lambda _, built, **__: seen(built)
    )
    planned = given_to(
        ds_zero,
        "plan",
        lambda: Planned.of(settings, lambda: model, ranks=1, device="cpu").memory(),
        lambda made, _, *, optimizer, **__: seen(
            optimizer([p for p in made.parameters() if p.requires_grad])
        ),
    )
    verified = given_to(
        verifying,
        "Recipe",
        lambda: verifying.verify(settings, Tables, [(torch.zeros(1, dtype=torch.long),)]),
        lambda *, make, **_: seen(make()[1]),
    )
    assert initialized == planned == verified


def test_states_in_bf16_are_planned_as_such() -> None:
    """Before, `plan` saw fp32 states whatever the configuration said."""

    def states(**section: Any) -> int:
        settings = load(jobs.config(1, scheduler=None, bf16={"enabled": True, **section}))
        made = (nn.Linear(512, 512), torch.empty(1, 512))
        predicted = Planned.of(settings, lambda: made, ranks=1, device="cpu").memory()
        step = next(p for p in json.loads(predicted.to_json())["phases"] if p["phase"] == "step")
        return int(step["parts"]["states"])

    assert states(bf16_optimizer_states=True) == pytest.approx(states() / 2, rel=0.01)


@pytest.mark.parametrize("name", ["Muon", "RMSprop"])
def test_states_in_bf16_that_an_optimizer_lacks_are_refused(name: str) -> None:
    settings = load(
        jobs.config(optimizer={"type": name}, bf16={"enabled": True, "bf16_optimizer_states": True})
    )
    with pytest.raises(ds_engine.ConfigError, match=f"'s {name} keeps its states in the dtype of the fp32"):
        ds_engine.initialize(Tables(), settings)


def test_a_job_cannot_be_changed_and_has_no_options() -> None:
    settings = load(jobs.config(3, bf16={"enabled": True}, gradient_clipping=0))
    job = describe(choices_of(settings), arranged(settings, 1, 2), "cpu")
    with pytest.raises(dataclasses.FrozenInstanceError):
        job.stage = 2  # type: ignore[misc]
    assert (job.stage, job.accumulating.plan, job.batch.micro) == (3, "sharded", 4)
    assert job.clipping == float("inf") and job.precision.param_dtype == torch.bfloat16
    assert job == describe(choices_of(settings), arranged(settings, 1, 2), "cpu")


def test_placement_names_every_kind_of_state() -> None:
    def placed(device: str) -> tuple[str, ...]:
        section = {"stage": 2, "offload_optimizer": {"device": device}}
        placement = choices_of(load(jobs.config(zero_optimization=section))).placement
        return placement.params, placement.gradients, placement.masters, placement.optimizer_states

    assert placed("none") == ("device",) * 4 and placed("cpu") == ("device", "cpu", "cpu", "cpu")
