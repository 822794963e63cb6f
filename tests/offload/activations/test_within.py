"""A limit of device memory for activations: which layers are moved, in training and in a plan, and the counted peak."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

import ds_zero
from ds_core import arena
from ds_offload import ActivationOffload, ActivationOptions, CPUAdam, PlannedActivationOffload
from ds_offload.activations.choice import BudgetTooSmall, LayerChoice
from ds_zero.predict.measured_memory import counted_memory
from offload.activations.models import gradients, net, same
from zero.planned import Gpt

MIB = 1 << 20
LAYERS = 8
SAVED = (LAYERS + 1) * MIB


class Stack(nn.Module):
    """Layers that save 1 MiB each, the first one 2: in a list, or one after the other without any."""

    def __init__(self, *, listed: bool) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(LAYERS)]
        self.layers = layers if not listed else nn.ModuleList(layers)
        if not listed:
            for number, layer in enumerate(layers):
                for name, param in layer[0].named_parameters():
                    self.register_parameter(f"{name}{number}", param)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def peaks(listed: bool, limit_bytes: int) -> tuple[dict[str, int], ActivationOffload]:
    """Peaks of torch's allocations in the second forward and backward."""
    model, x = Stack(listed=listed), torch.randn(4096, 64)  # 1 MiB
    offload = ActivationOffload(ActivationOptions(device_bytes=limit_bytes))
    offload.attach(model)
    model(x).sum().backward()
    gc.collect()
    with counted_memory() as counted:
        counted.mark("forward")
        loss = model(x).sum()
        counted.mark("backward")
        loss.backward()
    return dict(counted.phase_bytes), offload


@pytest.mark.parametrize("listed", [True, False])
def test_the_counted_peak_is_within_the_limit(listed: bool) -> None:
    kept = []
    for limit in (4 * MIB, 6 * MIB, 8 * MIB, SAVED):
        found, offload = peaks(listed, limit)
        assert offload.choice is not None
        for phase, peak in ((name, found[name]) for name in ("forward", "backward")):
            # Two tensors of a layer are not saved: what Linear returns, or the gradients of its input and output.
            assert limit / 2 < peak <= limit + 2.1 * MIB, f"{phase} with {limit} bytes: {offload.choice}"
        kept.append(offload.choice.kept_bytes)
        offload.close()
    assert kept[0] < kept[1] < kept[2] < kept[3] == SAVED
    assert kept[0] >= 2 * MIB and kept[2] >= 5 * MIB
    with pytest.raises(
        BudgetTooSmall, match=r"may take 1\.0 MiB of the device, and with layers moved .* at least"
    ):
        peaks(listed, MIB)


def test_the_chosen_layers_are_the_first_and_gradients_stay() -> None:
    choices: list[LayerChoice] = []
    model = net(layers=6)
    expected = gradients(model)
    probe = ActivationOffload(ActivationOptions(min_bytes=512))
    gradients(model, probe)
    limit = probe.statistics.moved_bytes * 2 // 3
    options = ActivationOptions(min_bytes=512, device_bytes=limit)
    offload = ActivationOffload(options, chosen=choices.append)
    offload.attach(model)
    for _ in range(3):
        assert same(gradients(model), expected)
    [choice] = choices
    assert choice.moved and choice.moved == tuple(f"blocks.{i}" for i in range(len(choice.moved)))
    assert 0 < len(choice.moved) < 6 and choice.peak_bytes <= limit
    assert f"({choice.moved[0]} to {choice.moved[-1]})" in str(choice) and "waited" not in str(choice)
    offload.close()
    with pytest.raises(ValueError, match=r"device_bytes=5 limits .* leave budget_bytes=7 out"):
        ActivationOptions(device_bytes=5, budget_bytes=7)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_plan_chooses_what_training_chooses(device: str) -> None:
    batch = (torch.zeros(32, 16, dtype=torch.long), torch.ones(32, 16, dtype=torch.long))
    options = ActivationOptions(min_bytes=1024, device_bytes=12 * MIB)
    common: dict[str, Any] = {"stage": 2, "optimizer": CPUAdam, "device": device}
    common["config"] = ds_zero.ZeroConfig(accumulation_steps=1)
    moved = PlannedActivationOffload(options)
    build = lambda: Gpt(layers=6)  # noqa: E731
    plan = ds_zero.plan(build, batch, activations=moved, **common)
    plain = ds_zero.plan(build, batch, **common)
    assert moved.choice is not None and moved.choice.moved and moved.choice.kept_bytes
    for phase in ("forward", "backward"):
        both = [p.phase(phase).parts["activations"] for p in (plan, plain)]
        on_host = plan.host_bytes if device == "cpu" else 0  # counted as device memory, too
        # Some tensors of the block that computes are not saved, or are gradients.
        assert both[0] - on_host <= (12 + 3) * MIB < both[1]
    if device == "cuda":
        return
    gc.collect()
    with counted_memory(native_bytes=lambda: arena.stats().in_use_bytes) as counted:
        with ds_zero.deferred_init(stage=2):
            model = build()
        optimizer = CPUAdam(model.parameters())
        ds_zero.shard(model, optimizer, 2, config=common["config"])
        offload = ActivationOffload(options)
        offload.attach(model)
        for _ in range(2):
            counted.mark("forward")
            loss = model(*batch)
            counted.mark("backward")
            loss.backward()
            counted.mark("step")
            optimizer.step()
            optimizer.zero_grad()
            counted.mark("between")
    assert offload.choice == moved.choice
    for phase in ("forward", "backward"):
        counted_bytes = counted.phase_bytes[phase]
        assert counted_bytes == pytest.approx(plan.phase(phase).device_bytes, rel=0.05)
    offload.close()
    ds_zero.destroy(model)
