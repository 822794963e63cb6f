"""What the sections fp16, bf16, torch_autocast and data_types turn into."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import ds_zero
from ds_engine.build.topology import arranged
from ds_engine.build.zero import Unguarded, guard_of, loss_scale_of
from ds_engine.config import ConfigError, load
from ds_engine.job import choices_of, describe
from ds_engine.job.precision import Precision, lowered


def of(**sections: Any) -> Precision:
    return Precision.of(load({"train_batch_size": 1, **sections}))


class Pair(NamedTuple):
    left: torch.Tensor
    right: Any


def test_bf16_casts_floating_tensors_wherever_they_are() -> None:
    precision = Precision.of(load({"train_batch_size": 1, "bf16": {"enabled": True}}))
    x, n = torch.ones(2), torch.ones(2, dtype=torch.int64)
    out = precision.cast((x, [x, n], {"a": x, "b": "text"}, Pair(x, {"c": (x,)}), 3))
    assert out[0].dtype == out[1][0].dtype == out[2]["a"].dtype == torch.bfloat16
    assert out[1][1] is n and out[2]["b"] == "text" and out[4] == 3
    assert isinstance(out[3], Pair) and out[3].left.dtype == out[3].right["c"][0].dtype == torch.bfloat16


@pytest.mark.parametrize("section", [{}, {"bf16": {"enabled": False}}])
def test_fp32_casts_nothing(section: dict[str, Any]) -> None:
    precision = Precision.of(load({"train_batch_size": 1, **section}))
    value = (torch.ones(1, dtype=torch.float64), [torch.ones(1)])
    assert precision.cast(value) is value


def test_fp16_casts_inputs_only_where_it_is_asked_to() -> None:
    x = torch.ones(2)
    assert of(fp16={"enabled": True}).cast(x) is x
    assert of(fp16={"enabled": True, "auto_cast": True}).cast(x).dtype == torch.float16
    assert of(fp16={"auto_cast": True}).cast(x) is x


@pytest.mark.parametrize(
    ("sections", "scale"),
    [
        ({}, 1.0),
        ({"bf16": {"enabled": True}}, 1.0),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, None),
        ({"bf16": {"check_grad_overflow": False}}, 1.0),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, 128.0),
        ({"fp16": {"loss_scale": 128}}, 1.0),
        ({"fp16": {"enabled": True}}, ds_zero.DynamicScale(raise_at_min=False)),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, ds_zero.DynamicScale()),
        (
            {
                "fp16": {
                    "enabled": True,
                    "initial_scale_power": 10,
                    "loss_scale_window": 7,
                    "hysteresis": 3,
                    "consecutive_hysteresis": True,
                    "min_loss_scale": 4,
                }
            },
            ds_zero.DynamicScale(
                initial_scale=1024.0,
                window=7,
                hysteresis=3,
                consecutive_hysteresis=True,
                min_scale=4.0,
                raise_at_min=False,
            ),
        ),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, ds_zero.DynamicScale(raise_at_min=False)),
        ({"torch_autocast": {"enabled": True}}, 1.0),
    ],
)
def test_what_guards_a_step(sections: dict[str, Any], scale: object) -> None:
    assert loss_scale_of(of(**sections).loss_scaling) == scale


def test_without_a_guard_nothing_is_scaled() -> None:
    settings = load({"train_batch_size": 1, "bf16": {"enabled": True, "check_grad_overflow": False}})
    scaler = guard_of(describe(choices_of(settings), arranged(settings, 0, 1), "cpu"), nn.Linear(1, 1))
    loss = torch.ones(())
    assert isinstance(scaler, Unguarded) and scaler.scale(loss) is loss and scaler.loss_scale == 1.0


def test_dtypes_in_every_spelling() -> None:
    for text in ("bf16", "bfloat16", "torch.bfloat16", "BFloat16"):
        assert of(data_types={"grad_accum_dtype": text}).grad_dtype == torch.bfloat16
    assert of().grad_dtype == of(data_types={"grad_accum_dtype": None}).grad_dtype == torch.float32
    assert str(of(fp16={"enabled": True}, data_types={"grad_accum_dtype": "half"})) == (
        "fp16, with fp32 masters; gradients summed in fp16; loss scale from 65536, dynamic"
    )


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"torch_autocast": {"enabled": True, "lower_precision_safe_modules": "torch.nn.Linearr"}}, "Linear"),
        ({"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["Linear"]}}, "the full name"),
        (
            {"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["no.such.Module"]}},
            "no.such",
        ),
        (
            {"fp16": {"enabled": True, "initial_scale_power": 2, "min_loss_scale": 8}},
            "is below fp16.min_loss_scale",
        ),
    ],
)
def test_what_cannot_be_is_refused(sections: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        of(**sections)


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "exclude each other"),
        (
            {"fp16": {"enabled": True}, "data_types": {"param_dtype": "bf16"}},
            "param_dtype differs from the dtype",
        ),
        ({"data_types": {"param_dtype": "fp16"}}, "param_dtype differs from the dtype"),
        ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, "16-bit master weights"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16_optimizer_states"),
        ({"fp16": {"hysteresis": 0}}, "hysteresis is 0: it must be at least 1"),
        ({"fp16": {"loss_scale": -1}}, "loss_scale is -1"),
        ({"data_types": {"grad_accum_dtype": "int8"}}, "grad_accum_dtype"),
        ({"torch_autocast": {"enabled": True, "dtype": "fp32"}}, "torch_autocast.dtype is"),
    ],
)
def test_what_excludes_each_other_is_refused(sections: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        of(**sections)


def test_what_agrees_is_accepted() -> None:
    assert of(fp16={"enabled": True}, data_types={"param_dtype": "float16"}).param_dtype == torch.float16
    assert of(bf16={"enabled": True, "immediate_grad_update": True}).param_dtype == torch.bfloat16


def test_only_what_safe_modules_hold_alone_is_lowered() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(5, 4), "mid": nn.Linear(4, 4), "head": nn.Linear(4, 5, bias=False)}
    )
    model["norm"] = nn.LayerNorm(4)
    tied = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    tied["head"].weight = tied["embed"].weight
    found = lowered(model, (nn.Linear,), torch.bfloat16)
    given = {n: found(n, p) for n, p in model.named_parameters()}
    assert {n for n, d in given.items() if d is not None} == {"mid.weight", "mid.bias", "head.weight"}
    found = lowered(tied, (nn.Linear,), torch.bfloat16)
    assert all(found(n, p) is None for n, p in tied.named_parameters())


class Buffers(nn.Module):
    _keep_in_fp32_modules_strict = ("*_bias",)
    _keep_in_fp32_modules = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
        for name in ("route_bias", "scale", "other"):
            self.register_buffer(name, torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("count", torch.ones(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("sections", "fp32", "rest"),
    [
        ({"bf16": {"enabled": True}}, {"route_bias"}, torch.bfloat16),
        ({"fp16": {"enabled": True}}, {"route_bias", "scale"}, torch.bfloat16),
        (
            {"fp16": {"enabled": True}, "data_types": {"buffer_dtype": "fp16"}},
            {"route_bias", "scale"},
            torch.float16,
        ),
        ({"bf16": {"enabled": True}, "data_types": {"keep_in_fp32_modules": []}}, set(), torch.bfloat16),
        (
            {"bf16": {"enabled": True}, "data_types": {"keep_in_fp32_modules": ["o*r"]}},
            {"other"},
            torch.bfloat16,
        ),
        ({}, set(), torch.bfloat16),
        ({"data_types": {"buffer_dtype": "fp32"}}, {"route_bias", "scale", "other"}, torch.float32),
    ],
)
def test_buffers_take_their_dtypes(sections: dict[str, Any], fp32: set[str], rest: torch.dtype) -> None:
    model = nn.Sequential(Buffers())
    before = dict(model.named_buffers())
    of(**sections).cast_buffers(model)
    after = dict(model.named_buffers())
    assert all(before[n] is after[n] for n in before), "the same tensor objects"
    assert after.pop("0.count").dtype == torch.int64
    assert {n.removeprefix("0.") for n, b in after.items() if b.dtype == torch.float32} == fp32
    assert {b.dtype for n, b in after.items() if n.removeprefix("0.") not in fp32} <= {rest}
