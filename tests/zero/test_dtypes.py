"""Dtypes of single parameters and of gradient sums; publication in small messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_zero
from ds_core.optim import FusedAdam
from ds_offload import CPUAdam, HostStore
from ds_zero.comm.collectives import TorchAllGather
from ds_zero.comm.direct import OrderedReduceScatter
from harness import ranks
from zero.models import Tiny, batch
from zero.parity import Job, assert_same, sharded

STAGES = [0, 1, 2, 3]


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def fused(params: Any) -> torch.optim.Optimizer:
    return FusedAdam(params, lr=1e-2, weight_decay=0.1)


def host(params: Any) -> torch.optim.Optimizer:
    return CPUAdam(params, lr=1e-2, weight_decay=0.1)


@ranks(2)
@pytest.mark.parametrize("make", [adamw, fused, host])
@pytest.mark.parametrize("plan", ["local", "sharded"])
def test_16_bit_sums_are_alike_at_every_stage_and_are_rounded(plan: str, make: Any) -> None:
    store = HostStore if make is host else lambda: None
    job = Job(steps=4, accumulation=3, clip=0.3, dtype=torch.bfloat16, optimizer=make, model={"extras": True})
    first = sharded(job, 0, store=store(), accumulation=plan, grad_dtype=torch.bfloat16)
    for stage in (1, 3) if make is not adamw else (2,):
        found = sharded(job, stage, store=store(), accumulation=plan, grad_dtype=torch.bfloat16)
        assert_same(found, first)
    exact = sharded(job, 0, store=store(), accumulation=plan)
    assert first.losses[:3] == exact.losses[:3] and first.losses != exact.losses
    torch.testing.assert_close(torch.tensor(first.losses), torch.tensor(exact.losses), rtol=0.02, atol=0)


def test_a_16_bit_sum_is_that_of_16_bit_additions() -> None:
    """1 + 1/256 + 1/256 + ...: bf16 stays at 1, fp32 does not."""
    for dtype, wanted in ((torch.bfloat16, 1.0), (torch.float32, 1.0 + 8 / 512)):
        model = nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ds_zero.shard(model, optimizer, 2, config=ds_zero.ZeroConfig(grad_dtype=dtype))
        for step in range(9):
            model(torch.tensor([[1.0 if step == 0 else 1 / 512]])).sum().backward()
        assert ds_zero.clip_grad_norm_(model, 0).item() == wanted
        (shard,) = optimizer.param_groups[0]["params"]
        assert shard.grad.dtype == dtype
        before = shard.item()
        optimizer.step()
        assert shard.item() == pytest.approx(before - 0.1 * wanted, rel=1e-6)
        assert shard.grad.dtype == dtype, "the gradient is back after the step"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"grad_dtype": torch.float64}, r"grad_dtype=torch\.float64: give one of torch\.float32"),
        ({"grad_dtype": torch.int32}, "grad_dtype"),
        ({"publish_bucket_numel": 0}, "publish_bucket_numel=0"),
        ({"param_dtype": torch.bfloat16, "dtype_for": lambda n, p: None}, "both given"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ds_zero.ZeroConfig(**options)


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_each_parameter_has_the_dtype_it_is_given(stage: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8).bfloat16())
    given = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = adamw(model.parameters())

    def low(name: str, param: nn.Parameter) -> torch.dtype | None:
        return torch.bfloat16 if name.startswith("0") else torch.float32 if name.startswith("1") else None

    config = ds_zero.ZeroConfig(dtype_for=low, persistence_threshold_numel=0)
    ds_zero.shard(model, optimizer, stage, config=config)
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    assert {n[0]: d for n, d in dtypes.items()} == {
        "0": torch.bfloat16,
        "1": torch.float32,
        "2": torch.bfloat16,
    }
    masters = ds_zero.full_state_dict(model)
    assert all(torch.equal(masters[n], given[n].float()) for n in masters), "masters keep what was given"
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    model[2](model[1](model[0](x).float()).bfloat16()).float().sum().backward()
    optimizer.step()


@ranks(2)
def test_masters_keep_what_was_given_in_several_dtypes() -> None:
    """A bf16 model with an fp32 normalisation, all to compute in bf16: one bucket, and no digit lost."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8))
    given = {n: p.detach().clone() for n, p in model.named_parameters()}
    ds_zero.shard(model, adamw(model.parameters()), 1, config=ds_zero.ZeroConfig(param_dtype=torch.bfloat16))
    masters = ds_zero.full_state_dict(model)
    assert all(torch.equal(masters[n], given[n].float()) for n in masters)


class Counting(TorchAllGather):
    """Notes the size of every gathered message."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(
        self, output: Tensor, input: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        self.sizes.append(output.numel())
        return super().__call__(output, input, group, async_op)


@ranks(2)
@pytest.mark.parametrize("overlap", [False, True])
def test_published_messages_have_the_size_asked_for(overlap: bool) -> None:
    found: list[tuple[Sequence[int], dict[str, Tensor]]] = []
    for numel in (None, 500, 10**9):
        torch.manual_seed(0)
        model, gather = Tiny(), Counting()
        optimizer = fused(model.parameters())
        config = ds_zero.ZeroConfig(publish_bucket_numel=numel, overlap_publish=overlap)
        ds_zero.shard(model, optimizer, 1, config=config, comm=ds_zero.Comm(gather, OrderedReduceScatter()))
        for step in range(2):
            model(*batch(step, dist.get_rank())).backward()
            gather.sizes.clear()
            optimizer.step()
            optimizer.zero_grad()
        found.append((list(gather.sizes), {k: v.clone() for k, v in model.state_dict().items()}))
    (whole, weights), (small, same), (large, again) = found
    assert large == whole and max(whole) > 500
    assert max(small) <= 500 and sum(small) == sum(whole) and len(small) == sum(-(-n // 500) for n in whole)
    assert all(torch.equal(v, same[k]) and torch.equal(v, again[k]) for k, v in weights.items())


@ranks(2)
@pytest.mark.parametrize("stage, publishes", [(0, False), (1, True), (3, False)])
def test_one_pass_over_all_masters_where_nothing_is_published(
    stage: int, publishes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 0 in 16 bits: unscale, clip, Adam and cast of all parameters in one kernel call; stages 1 and 2 one
    for each message."""
    model = Tiny()
    optimizer = fused(model.parameters())
    config = ds_zero.ZeroConfig(param_dtype=torch.float16, reduce_bucket_numel=2000)
    ds_zero.shard(model, optimizer, stage, config=config)
    scaler = ds_zero.LossScaler(model, 64.0)
    seen: list[int] = []
    inner = optimizer._apply

    def count(group: Any, work: Any, grad_scale: float) -> None:
        seen.append(len(work.params))
        inner(group, work, grad_scale)

    monkeypatch.setattr(optimizer, "_apply", count)
    scaler.scale(model(*batch(0, dist.get_rank()))).backward()
    ds_zero.clip_grad_norm_(model, 0.1)
    optimizer.step()
    assert len(seen) == (ds_zero.describe(model).num_buckets if publishes else 1)
    assert ds_zero.describe(model).num_buckets > 1
