"""Steps leave nothing behind: the same buffers at the same place, the same number of tensors, the same memory."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_zero
from ds_zero import _registry
from ds_zero.tensors.placeholder import ReducedGradient
from harness import ranks
from zero.models import Tiny, batch

PAGE_BYTES = 4096


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def living() -> tuple[int, int]:
    """Tensors that exist, and the bytes of their distinct storages; what `param.grad` shows has none."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, Tensor)]
    with_memory = [t for t in tensors if not isinstance(t, ReducedGradient)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in with_memory}
    return len(tensors), sum(storages.values())


def places(model: nn.Module) -> list[tuple[int, int, bool]]:
    """Address, size and contiguity of everything that a bucket holds between steps."""
    found = []
    for bucket in _registry.state_of(model).buckets:
        kinds = [bucket.storage.addressable(kind) for kind in ("master", "grad", "param")]
        held = [*kinds, bucket.full] if bucket.whole else kinds
        found += [(t.data_ptr(), t.numel(), t.is_contiguous()) for t in held if t is not None]
    return found


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for micro in range(2):
            (model(*batch(2 * step + micro, dist.get_rank())) / 2).backward()
        ds_zero.clip_grad_norm_(model, 0.3)
        optimizer.step()
        optimizer.zero_grad()


def check(stage: int, plan: str, steps: int) -> None:
    torch.manual_seed(0)
    model = Tiny(dim=32, tied=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = ds_zero.ZeroConfig(reduce_bucket_numel=3000, accumulation=plan)  # type: ignore[arg-type]
    ds_zero.shard(model, optimizer, stage, config=config)
    train(model, optimizer, range(steps // 5))
    before, where, resident = living(), places(model), resident_bytes()
    train(model, optimizer, range(steps // 5, 3 * steps // 5))
    middle = resident_bytes()
    train(model, optimizer, range(3 * steps // 5, steps))
    last = resident_bytes()
    assert living() == before
    assert places(model) == where
    assert all(contiguous for *_, contiguous in where)
    # One leaked bucket a step would be 12 kB. What leaks grows in both halves; the heap may grow once.
    assert min(middle - resident, last - middle) < max(1_000_000, 2 * steps // 5 * 6_000)


@ranks(2)
@pytest.mark.parametrize("stage, plan", [(3, "sharded"), (1, "local")])
def test_a_hundred_steps(stage: int, plan: str) -> None:
    check(stage, plan, 100)


@pytest.mark.full
@ranks(2, timeout_s=600)
@pytest.mark.parametrize("plan", ["local", "sharded"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_thousand_steps(stage: int, plan: str) -> None:
    check(stage, plan, 1000)
