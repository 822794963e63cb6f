"""PagedOptimizer as the optimizer of a model that FSDP2 has sharded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ds_offload import CPUAdam, PagedOptimizer
from harness import ranks


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(33, 200), nn.Tanh(), nn.Linear(200, 7), nn.Linear(7, 1))
    for layer in made:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(made)


def train(module: nn.Module, optimizer: Optimizer, rank: int) -> None:
    for step in range(4):
        torch.manual_seed(10 * step + rank)
        module(torch.randn(8, 33)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@ranks(2)
def test_it_trains_like_the_optimizer_in_memory(tmp_path: Path) -> None:
    rank = torch.distributed.get_rank()
    plain, paged, fused = model(), model(), model()
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, foreach=True), rank)
    optimizer = PagedOptimizer(
        torch.optim.AdamW(paged.parameters(), lr=1e-2, foreach=True), tmp_path, page_bytes=16384
    )
    train(paged, optimizer, rank)
    on_host = PagedOptimizer(CPUAdam(fused.parameters(), lr=1e-2, weight_decay=0.01), tmp_path)
    train(fused, on_host, rank)
    for a, b, c in zip(plain.parameters(), paged.parameters(), fused.parameters(), strict=True):
        assert isinstance(a, DTensor) and isinstance(b, DTensor) and isinstance(c, DTensor)
        assert torch.equal(a.to_local(), b.to_local())
        torch.testing.assert_close(a.to_local(), c.to_local(), rtol=1e-5, atol=1e-6)
    moment = optimizer.state[next(iter(paged.parameters()))]["exp_avg"]
    assert isinstance(moment, DTensor) and moment.placements == next(iter(paged.parameters())).placements
    optimizer.close()
    on_host.close()
