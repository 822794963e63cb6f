"""The section `optimizer` becomes the optimizer it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ds_core.optim
import ds_engine
import ds_offload
from ds_engine.build import optimizer
from ds_engine.config import ConfigError
from ds_engine.job import OptimizerChoice
from engine import jobs
from harness import ranks


def build(
    name: str,
    params: dict[str, Any],
    on_host: bool = False,
    parameters: Any = None,
    names: dict[int, str] | None = None,
) -> torch.optim.Optimizer:
    choice = OptimizerChoice(name=name, params=params, on_host=on_host)
    return optimizer.build(choice, parameters or [torch.nn.Parameter(torch.ones(3))], names or {})


@pytest.mark.parametrize("name", ["Adam", "AdamW", "adamw"])
def test_adam_is_our_kernel_with_decoupled_decay(name: str) -> None:
    made = build(name, {"lr": 0.5, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.1})
    assert type(made) is ds_core.optim.FusedAdam
    group = made.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.8, 0.9), 1e-6, 0.1)


def stepped(made: torch.optim.Optimizer) -> torch.Tensor:
    (param,) = made.param_groups[0]["params"]
    param.grad = torch.full_like(param, 0.5)
    made.step()
    return param.detach()


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_w_mode_decides_how_weights_decay(decoupled: bool, on_host: bool) -> None:
    params = {"lr": 0.1, "weight_decay": 0.5}
    reference = torch.optim.AdamW if decoupled else torch.optim.Adam
    wanted = stepped(reference([torch.nn.Parameter(torch.ones(3))], **params))
    found = stepped(build("Adam", {**params, "adam_w_mode": decoupled}, on_host))
    torch.testing.assert_close(found, wanted)


def test_on_the_host_adam_is_cpu_adam() -> None:
    assert type(build("AdamW", {"lr": 0.1}, on_host=True)) is ds_offload.CPUAdam


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "Lamb"])
def test_moments_can_stay_uncorrected(name: str, on_host: bool) -> None:
    """The first step of Adam without correction is smaller by (1 - beta1) / sqrt(1 - beta2)."""
    params = {"lr": 0.1, "eps": 0.0, "weight_decay": 0.0}
    moved = 1 - stepped(build(name, {**params, "bias_correction": False}, on_host))
    corrected = 1 - stepped(build(name, params, on_host))
    factor = 1.0 if name == "Lamb" else 0.1 / 0.001**0.5  # Lamb's step has the norm of the parameter
    torch.testing.assert_close(moved, factor * corrected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["SGD", "Lion", "Adagrad", "RMSprop"])
def test_any_optimizer_can_be_asked_for_on_the_host(name: str) -> None:
    made = build(name, {"lr": 0.1}, on_host=True)
    torch.testing.assert_close(stepped(made), stepped(build(name, {"lr": 0.1})))
    assert type(build("Adam", {"torch_adam": True}, on_host=True)) is torch.optim.AdamW


@ranks(2)
@pytest.mark.parametrize(
    ("name", "params", "stage"),
    [
        ("SGD", {"momentum": 0.9}, 1),
        ("Lion", {}, 3),
        ("Adagrad", {}, 2),
        ("Muon", {}, 3),
        ("Lamb", {}, 1),
        ("AdamW", {"torch_adam": True}, 3),
    ],
)
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_states_on_the_host_and_on_a_disk_train_alike(
    name: str, params: dict[str, Any], stage: int, clip: float, tmp_path: Path
) -> None:
    losses = []
    for device in ("none", "cpu", "nvme"):
        section = {"stage": stage, "offload_optimizer": {"device": device, "nvme_path": str(tmp_path)}}
        optimizer = {"type": name, "params": {"lr": 0.01, **params}}
        engine = jobs.engine(
            optimizer=optimizer, scheduler=None, zero_optimization=section, gradient_clipping=clip
        )
        losses.append(jobs.train(engine, 3))
        engine.destroy()
    assert all(other == losses[0] for other in losses)


@ranks(2)
def test_a_given_optimizer_steps_on_the_host_where_that_is_allowed() -> None:
    losses = []
    for offload in ({}, {"offload_optimizer": {"device": "cpu"}}):
        config = jobs.config(
            scheduler=None,
            zero_force_ds_cpu_optimizer=False,
            zero_optimization={"stage": 2, **offload},
            train_batch_size=16,
        )
        del config["optimizer"]
        model = jobs.net()
        given = torch.optim.RMSprop([p for p in model.parameters() if p.requires_grad], lr=0.01)
        engine, *_ = ds_engine.initialize(model=model, config=config, optimizer=given)
        losses.append(jobs.train(engine, 3))
        engine.destroy()
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("name", "params", "kind"),
    [
        ("RMSprop", {"lr": 0.1, "alpha": 0.5}, torch.optim.RMSprop),
        ("nadam", {"lr": 0.1}, torch.optim.NAdam),
        ("SGD", {"lr": 0.1, "momentum": 0.9}, getattr(ds_core.optim, "FusedSGD", torch.optim.SGD)),
        ("Adagrad", {"lr": 0.1}, getattr(ds_core.optim, "FusedAdagrad", torch.optim.Adagrad)),
    ],
)
def test_other_names(name: str, params: dict[str, Any], kind: type) -> None:
    assert type(build(name, params)) is kind


def test_defaults_are_deepspeeds() -> None:
    """A config without them means the same training."""
    assert build("Lion", {}).defaults["lr"] == 1e-3
    assert build("Lion", {}).defaults["betas"] == (0.9, 0.999)
    lamb = build("Lamb", {"max_coeff": 5.0}).defaults
    assert (lamb["eps"], lamb["max_ratio"], lamb["min_ratio"]) == (1e-8, 5.0, 0.01)
    assert build("AdamW", {}).defaults["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("name", "params", "kind"),
    [
        ("AdamW", {"torch_adam": True, "amsgrad": True}, torch.optim.AdamW),
        ("Adam", {"torch_adam": True, "adam_w_mode": False, "foreach": False}, torch.optim.Adam),
        ("Adam", {"torch_adam": True}, torch.optim.AdamW),
        ("SGD", {"lr": 0.1, "foreach": True}, torch.optim.SGD),
        (
            "Adam",
            {
                "bias_correction": True,
                "amsgrad": False,
                "torch_adam": False,
                "fp32_optimizer_states": True,
                "set_grad_none": True,
            },
            ds_core.optim.FusedAdam,
        ),
    ],
)
def test_settings_of_deepspeeds_optimizers(name: str, params: dict[str, Any], kind: type) -> None:
    assert type(build(name, params)) is kind


@pytest.mark.parametrize(
    ("name", "params", "wanted"),
    [
        (
            "AdamW",
            {"amsgrad": True},
            "optimizer.params.amsgrad is True: our AdamW does not support this value; set it to false",
        ),
        ("Adam", {"fp32_optimizer_states": False}, "states are kept in fp32"),
        ("AdamW", {"adam_w_mode": False}, 'set optimizer.type to "Adam"'),
        ("Lamb", {"eps_inside_sqrt": True}, "our Lamb does not support this value"),
        ("AdamX", {}, 'optimizer.type is "AdamX": there is no such optimizer. Did you mean "Adam'),
        ("Quokka2000", {}, "Valid names: "),
        ("AdamW", {"learning_rate": 0.1}, "optimizer.params.learning_rate: AdamW has no such argument"),
        ("AdamW", {"wieght_decay": 0.1}, 'Did you mean "weight_decay"?'),
        ("RMSprop", {"alhpa": 0.1}, 'Did you mean "alpha"?'),
        ("AdamW", {"lr": -1.0}, "lr must not be negative"),
        ("AdamW", {"lr": "fast"}, "optimizer.params for AdamW"),
    ],
)
def test_mistakes(name: str, params: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(name, params)
    assert wanted in str(caught.value)


def test_parameter_groups_are_kept() -> None:
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.3},
        {"params": [torch.nn.Parameter(torch.ones(1))]},
    ]
    made = build("AdamW", {"lr": 0.1}, parameters=groups)
    assert [g["lr"] for g in made.param_groups] == [0.3, 0.1]


def test_muon_leaves_vectors_embeddings_and_heads_to_adam() -> None:
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(3, 2), "inner": torch.nn.Linear(2, 2), "lm_head": torch.nn.Linear(2, 3)}
    )
    names = {id(p): name for name, p in model.named_parameters()}
    params = {"lr": 0.1, "muon_lr": 0.5, "momentum": 0.8, "ns_method": "gram"}
    grouped = [{"params": list(model.parameters()), "weight_decay": 0.3}]
    made = build("muon", params, parameters=grouped, names=names)
    halves = {
        group["use_muon"]: ([names[id(p)] for p in group["params"]], group["lr"], group["weight_decay"])
        for group in made.param_groups
    }
    assert halves == {
        True: (["inner.weight"], 0.5, 0.3),
        False: (["embed.weight", "inner.bias", "lm_head.weight", "lm_head.bias"], 0.1, 0.3),
    }
    defaults = build("Muon", {}, parameters=list(model.parameters()), names=names)
    assert {g["use_muon"]: g["lr"] for g in defaults.param_groups} == {True: 0.02, False: 3e-4}
    with pytest.raises(ConfigError, match="per_head_muon"):
        build("Muon", {"per_head_muon": True}, parameters=list(model.parameters()))
