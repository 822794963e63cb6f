"""Counted bytes equal the formula, for every stage, accumulation plan and dtype."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_zero
from ds_offload import CPUAdam, HostStore
from harness import ranks
from zero.models import batch

LAYERS, DIM = 4, 64


def model() -> nn.Module:
    """Sizes are multiples of the alignment on 1, 2 and 4 ranks, so that the formula is exact without padding."""
    return nn.Sequential(nn.Embedding(64, DIM), *(nn.Linear(DIM, DIM, bias=False) for _ in range(LAYERS)))


def loss(m: nn.Module, rank: int) -> torch.Tensor:
    tokens, _ = batch(0, rank)
    return m(tokens).float().square().mean()


@ranks(1, 2, 4)
@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", ["local", "sharded"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_equal_the_formula(stage: int, plan: str, dtype: torch.dtype, host: bool) -> None:
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    m = model()
    numel = sum(p.numel() for p in m.parameters())
    make = CPUAdam if host else torch.optim.AdamW
    optimizer = make(m.parameters(), lr=1e-3)
    config = ds_zero.ZeroConfig(
        accumulation=plan,  # type: ignore[arg-type]
        param_dtype=dtype,
        persistence_threshold_numel=0,
    )
    ds_zero.shard(m, optimizer, stage, config=config, store=HostStore() if host else None)
    owned = numel if stage == 0 else numel // num_ranks
    two_micro_batches(m)
    waiting = 4 * numel if plan == "local" else 0
    assert ds_zero.memory(m, optimizer).grads_bytes == 4 * owned + waiting
    ds_zero.clip_grad_norm_(m, 1.0)
    assert ds_zero.memory(m, optimizer).grads_bytes == 4 * owned
    optimizer.step()
    optimizer.zero_grad()
    found = ds_zero.memory(m, optimizer)
    assert found.params_bytes == dtype.itemsize * (numel if stage < 3 else owned)
    assert found.masters_bytes == (0 if dtype == torch.float32 else 4 * owned)
    assert found.optimizer_bytes == 8 * owned
    assert found.gathered_bytes == 0
    assert (
        found.total_bytes
        == found.params_bytes + found.masters_bytes + found.grads_bytes + found.optimizer_bytes
    )


def two_micro_batches(m: nn.Module) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    for _ in range(2):
        loss(m, rank).backward()


@ranks(2)
def test_stage_3_never_gathers_more_than_two_units_at_once() -> None:
    m = model()
    optimizer = torch.optim.AdamW(m.parameters())
    ds_zero.shard(m, optimizer, 3, config=ds_zero.ZeroConfig(persistence_threshold_numel=0))
    largest = max(sum(p.numel() for p in child.parameters()) for child in m)
    peak = 0

    def look(*_: object) -> None:
        nonlocal peak
        peak = max(peak, ds_zero.memory(m, optimizer).gathered_bytes)

    for child in m:
        child.register_forward_hook(look)
    for p in m.parameters():
        p.register_post_accumulate_grad_hook(look)
    for _ in range(3):
        loss(m, dist.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (
        largest * 4 <= peak <= 3 * largest * 4
    )  # the present unit, the one fetched ahead, the first one until backward ends
    assert ds_zero.memory(m, optimizer).gathered_bytes == 0


@ranks(2)
def test_describe() -> None:
    m = model()
    optimizer = torch.optim.AdamW(m.parameters())
    ds_zero.shard(m, optimizer, 3)
    found = ds_zero.describe(m)
    numel = sum(p.numel() for p in m.parameters())
    assert (found.stage, found.accumulation, found.num_ranks) == (3, "sharded", 2)
    assert (found.params_numel, found.trainable_numel, found.owned_numel) == (numel, numel, numel // 2)
    assert found.num_gathered_buckets == LAYERS + 1
    assert found.compute_dtypes == ("torch.float32",)


@ranks(2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_leaves_no_reference_cycle_with_tensors(stage: int) -> None:
    """Cycles keep buffers until the garbage collector runs; a recursive closure once kept every received buffer."""
    m = model()
    optimizer = torch.optim.AdamW(m.parameters())
    ds_zero.shard(m, optimizer, stage, config=ds_zero.ZeroConfig(persistence_threshold_numel=0))
    for _ in range(2):
        loss(m, dist.get_rank()).backward()
        ds_zero.clip_grad_norm_(m, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.disable()
    try:
        loss(m, dist.get_rank()).backward()
        ds_zero.clip_grad_norm_(m, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert not [o for o in gc.garbage if isinstance(o, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
