"""`initialize` warns where the model's states alone do not fit, and says nothing where they do."""

from __future__ import annotations

import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import ds_engine
import ds_zero
from ds_engine.build.memory.check import Room
from ds_engine.launch import machine
from harness import ranks

NUMEL = 4 * (256 * 256 + 256)


def net() -> nn.Module:
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))


def start(model: nn.Module, stage: int, room_bytes: int) -> None:
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "startup_summary": False,
    }
    room = Room(device_bytes=room_bytes, host_bytes=room_bytes)
    with mock.patch.object(Room, "of", return_value=room):
        engine, *_ = ds_engine.initialize(model, settings)
    engine.destroy()


@ranks(4)
def test_what_does_not_fit_is_said_once_with_what_would(world_size: int) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        # 4 + 14 bytes an element are there; stage 0 takes 2 + 4 + 4 + 8, and a little for paddings.
        start(net(), 0, 13 * NUMEL)
    told = [str(w.message) for w in said]
    if torch.distributed.get_rank() != 0:
        assert told == []
        return
    [text] = told
    assert "263,168 parameters, stage 0, 4 ranks, FusedAdam" in text and "without activations" in text
    assert "4.52 MiB on every rank" in text and "4.27 MiB are free, a 4th of this machine's" in text
    assert "Nearest settings that fit: stage 1: " in text


@ranks(2)
def test_nothing_is_said_where_it_fits() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(net(), 0, 15 * NUMEL)  # a plan was made
        start(net(), 3, 6 * NUMEL)
        with mock.patch.object(ds_zero, "plan", side_effect=AssertionError("needs no plan")):
            start(net(), 0, 25 * NUMEL)


def test_what_cannot_be_planned_is_let_pass() -> None:
    with mock.patch.object(ds_zero, "plan", side_effect=ValueError("no plan")):
        start(net(), 1, 1)


def test_available_memory_is_the_least_of_all_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < machine.available_bytes() <= machine.memory_bytes()
    inner = tmp_path / "job"
    inner.mkdir()
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine, "_own_cgroup", lambda: inner)
    (inner / "memory.max").write_text("max\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200000\n")
    assert machine.available_bytes() == 500000
