"""The section `activation_offload`: activations are moved as it says, and training has the same bits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_engine
from ds_engine.build.memory.predict import predicted
from ds_engine.build.topology import arranged
from ds_engine.config import ConfigError, load
from ds_engine.job import choices_of, describe

ROWS, DIM = 32, 16
BYTES = ROWS * DIM * 4
"""One activation."""


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh()) for _ in range(6)))


def configured(section: dict[str, Any], stage: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": ROWS,
        "startup_summary": False,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
        "activation_offload": section,
        **more,
    }


def train(section: dict[str, Any], stage: int = 2, **more: Any) -> tuple[list[Tensor], Any]:
    """Weights after three steps, and the counts of what was moved."""
    config = configured(section, stage, **more)
    engine, *_ = ds_engine.initialize(model=layers(), config=config)
    with engine:
        for step in range(3):
            x = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(step))
            engine.backward((engine(x) - x).square().mean())
            engine.step()
        activations = engine.roles.activations
        statistics = activations.statistics if activations is not None else None
    return [p.detach().clone() for p in engine.module.parameters()], statistics


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_activations_are_moved(device: str, stage: int, tmp_path: Path) -> None:
    plain, nothing = train({}, stage)
    weights, counts = train({"device": device, "nvme_path": str(tmp_path), "min_bytes": 1024}, stage)
    assert nothing is None and all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))
    assert counts.moved_bytes >= 3 * 6 * BYTES and counts.late_tensors == 3
    open_files = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not any(str(tmp_path) in path for path in open_files), "destroy() leaves files open"


def test_small_tensors_stay_by_default() -> None:
    assert train({"device": "cpu"})[1].moved_bytes == 0


def test_only_layers_that_are_named_are_moved() -> None:
    one = train({"device": "cpu", "min_bytes": 1024, "layers": ["1"]})[1].moved_bytes
    two = train({"device": "cpu", "min_bytes": 1024, "layers": ["1", "2"]})[1].moved_bytes
    assert 0 < one < two < train({"device": "cpu", "min_bytes": 1024})[1].moved_bytes
    with pytest.raises(
        ConfigError,
        match=r"activation_offload.layers: Sequential has no submodule '9'. Its layers are '0.0', '0.1'",
    ):
        train({"device": "cpu", "layers": ["9"]})


def test_a_budget_keeps_the_last_ones() -> None:
    counts = train({"device": "cpu", "min_bytes": 1024, "budget_bytes": 2 * BYTES})[1]
    assert counts.kept_bytes == 2 * 2 * BYTES, "two in each forward but the first"


@pytest.mark.parametrize("device", ["none", "nvme"])
def test_a_budget_of_the_device_chooses_the_layers_as_the_plan_does(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = {"budget": {"activations": 5 * BYTES}}
    more = {"offload": budget, "zero_optimization": {"stage": 2}}
    section = {"device": device, "nvme_path": str(tmp_path), "min_bytes": 1024}
    plain, _ = train({}, zero_optimization={"stage": 2})
    weights, counts = train(section, **more)
    assert all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True)) and not capsys.readouterr().err
    saved = 7 * BYTES
    assert counts.moved_bytes + counts.kept_bytes == 3 * saved and counts.kept_bytes == 2 * 4 * BYTES
    train(section, startup_summary=True, **more)
    told = "3 layers are moved (0.0 to 1.1): 0.0 MiB leave and return"
    assert capsys.readouterr().err.count(f"ds: activations within offload.budget: {told}") == 1
    made = describe(
        choices_of(load(configured(section, **more))), arranged(load(configured(section)), 0, 1), "cpu"
    )
    plan = predicted(made, layers(), micro_batch=(torch.empty(ROWS, DIM),))
    assert any(told in note for note in plan.notes) and plan.moved_bytes == 3 * BYTES
    with pytest.raises(ConfigError, match=r"offload.budget.activations decides how many .* remove"):
        train({**section, "budget_bytes": 5}, **more)


def test_nothing_is_read_ahead_if_no_bytes_are_allowed() -> None:
    counts = train({"device": "cpu", "min_bytes": 1024, "prefetch_bytes": 0})[1]
    assert counts.late_tensors == counts.loaded_tensors > 3


def test_host_memory_is_limited() -> None:
    counts = train({"device": "cpu", "min_bytes": 1024, "max_host_bytes": 3 * BYTES})[1]
    assert counts.moved_bytes == 3 * 3 * BYTES


def test_a_disk_needs_a_folder() -> None:
    with pytest.raises(
        ConfigError, match=r'activation_offload\.device "nvme" needs nvme_path, a directory on the disk'
    ):
        train({"device": "nvme"})
