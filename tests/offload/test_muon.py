"""Muon, sharded, offloaded and clipped, trains like Muon on one process: norms are those of gradients, and matrices
that would straddle flat shards are orthogonalised whole.
"""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_zero
from ds_core.optim import Muon
from ds_offload import CPUMuon, HostStore, NVMeStore, PagedOptimizer
from harness import ranks

STEPS = 4
CLIP = 0.5


class Net(nn.Module):
    """Matrices of odd sizes, one of which has most of the elements, so that flat shards would cut it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(9, 61), nn.Linear(61, 61), nn.Linear(61, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean() * 30  # so that gradients are clipped


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(4, 9, generator=torch.Generator().manual_seed(10 * step + rank))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True)) ** 0.5


def plain(clip: float = CLIP, noise: float = 0.0) -> list[Tensor]:
    torch.manual_seed(0)
    model = Net()
    optimizer = Muon(model.parameters(), lr=0.02)
    for step in range(STEPS):
        loss: Any = sum(model(batch(step, rank)) for rank in range(dist.get_world_size()))
        (loss / dist.get_world_size()).backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), clip) > 2 * CLIP
        for p in model.parameters():
            assert p.grad is not None
            p.grad *= 1 + noise * torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def sharded(place: str, stage: int) -> list[Tensor]:
    torch.manual_seed(0)
    model = Net()
    store: Any = None
    optimizer: torch.optim.Optimizer = Muon(model.parameters(), lr=0.02)
    if place != "memory":
        optimizer = CPUMuon(model.parameters(), lr=0.02)
        store = HostStore() if place == "host" else NVMeStore(tempfile.mkdtemp())
    if place == "disk":
        optimizer = PagedOptimizer(optimizer, store, page_bytes=8192)  # the largest matrix has 14,884 bytes
    ds_zero.shard(model, optimizer, stage, store=store)
    for step in range(STEPS):
        model(batch(step, dist.get_rank())).backward()
        ds_zero.clip_grad_norm_(model, CLIP)
        optimizer.step()
        optimizer.zero_grad()
    ds_zero.destroy(model)
    return [p.detach().clone() for p in model.parameters()]


@ranks(2)
@pytest.mark.parametrize("stage", [1, 3])
def test_training_is_that_of_one_process(stage: int) -> None:
    expected = plain()
    in_memory = sharded("memory", stage)
    # Matrices are orthogonalised in bf16, so that the last bits of gradients matter.
    own = distance(plain(noise=3e-7), expected)
    assert distance(in_memory, expected) < 2 * own
    # Above the bound of the line before, on every processor: how far bf16 products differ depends on it.
    assert distance(plain(clip=1e9), expected) > 2 * own, "clipping makes no difference"
    for place in ("host", "disk"):
        other = sharded(place, stage)
        assert all(torch.equal(a, b) for a, b in zip(other, in_memory, strict=True)), place
