"""HostStore inside a sharded model: masters and gradients rest in the arena."""

from __future__ import annotations

import torch
from torch import nn

import ds_zero
from ds_core import arena
from ds_offload import CPUAdam, HostStore


def test_masters_and_gradients_rest_in_the_arena() -> None:
    before = arena.stats().in_use_bytes
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    numel = 2 * 64 * 64
    optimizer = CPUAdam(model.parameters())
    config = ds_zero.ZeroConfig(param_dtype=torch.bfloat16, persistence_threshold_numel=0)
    ds_zero.shard(model, optimizer, 3, config=config, store=HostStore())
    assert arena.stats().in_use_bytes - before == 8 * numel  # master and gradient
    model(torch.ones(2, 64, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert arena.stats().in_use_bytes - before == 16 * numel  # and two states
    assert ds_zero.memory(model, optimizer).params_bytes == 2 * numel
