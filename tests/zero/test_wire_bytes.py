"""What travels: bytes against the formula, and every option of the reduction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_zero
from ds_zero import _registry
from ds_zero.comm.collectives import Comm, TorchReduceScatter, default_comm
from ds_zero.interfaces import Work
from harness import ranks
from zero.models import Tiny, batch
from zero.parity import everywhere

CPU = torch.device("cpu")


def sharded(
    stage: int, comm: Comm | None = None, dtype: torch.dtype | None = None, **config: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tiny(dim=48)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = ds_zero.ZeroConfig(param_dtype=dtype, reduce_bucket_numel=4000, **config)
    return ds_zero.shard(model, optimizer, stage, config=options, comm=comm)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, micro_batches: int = 1) -> None:
    for step in steps:
        for micro in range(micro_batches):
            (model(*batch(step * micro_batches + micro, dist.get_rank())) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return everywhere(ds_zero.full_state_dict(model))


# --- bytes


@ranks(2, 4)
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("plan", ["local", "sharded"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_bytes_of_stages_0_to_2(stage: int, plan: str, micro_batches: int, world_size: int) -> None:
    comm = default_comm(CPU)
    model, optimizer = sharded(stage, comm, accumulation=plan)
    train(model, optimizer, range(2), micro_batches)
    before = comm.gathered_bytes + comm.reduced_bytes
    train(model, optimizer, range(2, 4), micro_batches)
    payload = 4 * sum(p.numel() for p in model.parameters())
    trips = 2 if plan == "local" else micro_batches + 1
    expected = payload * (world_size - 1) / world_size * trips * 2
    assert comm.gathered_bytes + comm.reduced_bytes - before == pytest.approx(expected, rel=0.03)


@ranks(2, 4)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_bytes_of_stage_3(micro_batches: int, world_size: int) -> None:
    comm = default_comm(CPU)
    model, optimizer = sharded(3, comm, persistence_threshold_numel=0)
    train(model, optimizer, range(2), micro_batches)
    before = comm.gathered_bytes + comm.reduced_bytes
    train(model, optimizer, range(2, 4), micro_batches)
    payload = 4 * sum(p.numel() for p in model.parameters())
    stays = 4 * model.get_submodule("head").weight.numel()  # the last unit is used again at once
    each = 3 * payload - stays
    expected = each * (world_size - 1) / world_size * micro_batches * 2
    assert comm.gathered_bytes + comm.reduced_bytes - before == pytest.approx(expected, rel=0.03)


@ranks(2)
def test_sixteen_bit_parameters_travel_in_sixteen_bits() -> None:
    comm = default_comm(CPU)
    model, optimizer = sharded(2, comm, torch.bfloat16)
    train(model, optimizer, range(1))
    payload = 2 * sum(p.numel() for p in model.parameters())
    assert comm.reduced_bytes == pytest.approx(payload / 2, rel=0.03)
    assert comm.gathered_bytes == pytest.approx(payload / 2, rel=0.03)


# --- options


@ranks(2, 3)
@pytest.mark.parametrize("stage", [1, 3])
def test_all_reduce_instead_of_reduce_scatter(stage: int) -> None:
    found, sent = [], []
    for scatter in (True, False):
        comm = default_comm(CPU)
        model, optimizer = sharded(stage, comm, reduce_scatter=scatter, prefetch=False)
        train(model, optimizer, range(3))
        found.append(weights(model))
        sent.append((comm.reduced_bytes, comm.gathered_bytes))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert sent[1][0] == pytest.approx(sent[0][0], rel=0.03), "but for what aligns slots"
    assert sent[1][1] - sent[0][1] == sent[1][0], "slices of the sum come back to everybody"


class Watched:
    """A reduction that writes down when it is started and when it is waited for."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._inner = default_comm(CPU).reduce_scatter

    def __call__(self, output: Tensor, input: Tensor, group: Any, op: Any, async_op: bool = False) -> Work:
        self.events.append("start")
        work = self._inner(output, input, group, op, async_op=True)
        assert work is not None

        class Noted:
            def wait(_) -> None:
                self.events.append("wait")
                work.wait()

        return Noted()


@ranks(2)
def test_reductions_overlap_unless_told_otherwise() -> None:
    events = {}
    for overlap in (None, False):
        watched = Watched()
        model, optimizer = sharded(2, Comm(default_comm(CPU).all_gather, watched), overlap_reduce=overlap)
        train(model, optimizer, range(1))
        events[overlap] = watched.events
    count = len(events[False]) // 2
    assert count > 3
    assert events[False] == ["start", "wait"] * count
    assert events[None][:2] == ["start", "start"], "one stays under way while backward goes on"
    assert events[None].count("wait") == count


@ranks(2)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_unused_parameters_can_be_refused(stage: int) -> None:
    torch.manual_seed(0)
    model = Tiny(extras=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ds_zero.shard(model, optimizer, stage, config=ds_zero.ZeroConfig(ignore_unused=False))
    model(*batch(0, dist.get_rank())).backward()
    with pytest.raises(ValueError, match=r"2 parameters got no gradient.*unused\.\w+ \(0 of 2 ranks\)"):
        optimizer.step()


class OneRankSkips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, use: bool) -> Tensor:
        return (self.sometimes(self.always(x)) if use else self.always(x)).sum()


@ranks(2)
def test_what_one_rank_does_not_use_is_refused_on_all() -> None:
    model = OneRankSkips()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, 2, config=ds_zero.ZeroConfig(ignore_unused=False))
    model(torch.ones(1, 4), True).backward()
    optimizer.step()
    optimizer.zero_grad()
    model(torch.ones(1, 4), dist.get_rank() == 0).backward()
    with pytest.raises(ValueError, match=r"sometimes\.weight \(1 of 2 ranks\)"):
        ds_zero.clip_grad_norm_(model, 1.0)


def gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """All gradients of this rank's micro-batch, reduced, on every rank."""
    model(*batch(0, dist.get_rank())).backward()
    ds_zero.clip_grad_norm_(model, 0.0)
    shards = optimizer.param_groups[0]["params"]
    parts = [torch.zeros(p.numel()) for p in model.parameters()]
    for part, shard in zip(parts, shards, strict=True):
        part[: shard.numel()] = shard.grad if shard.numel() else 0.0
    return torch.cat(parts)


def own_gradients() -> list[Tensor]:
    """Every rank's gradients in plain PyTorch, by rank."""
    torch.manual_seed(0)
    model = Tiny(dim=48)
    found = []
    for rank in range(dist.get_world_size()):
        grads = torch.autograd.grad(model(*batch(0, rank)), list(model.parameters()))
        found.append(torch.cat([g.flatten() for g in grads]))
    return found


@ranks(2)
def test_the_dtype_that_travels() -> None:
    comm = default_comm(CPU)
    found = gradients(*sharded(0, comm, communication_dtype=torch.bfloat16))
    first, second = (g.bfloat16().float() for g in own_gradients())
    assert torch.equal(found, (first + second) / 2)
    assert comm.reduced_bytes == pytest.approx(2 * found.numel() / 2, rel=0.03)


@ranks(2, 3)
def test_sum_instead_of_mean() -> None:
    found = gradients(*sharded(0, reduce_op="sum"))
    parts = own_gradients()
    total = parts[0] + parts[1] if len(parts) == 2 else (parts[0] + parts[1]) + parts[2]
    assert torch.equal(found, total)


@ranks(2)
def test_predivision_keeps_narrow_types_from_overflowing() -> None:
    def mean_of_large(factor: float) -> Tensor:
        model = nn.Linear(32, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = ds_zero.ZeroConfig(
            communication_dtype=torch.float16, predivide_factor=factor, accumulation="local"
        )
        ds_zero.shard(model, optimizer, 0, config=config)
        model(torch.full((1, 32), 100_000.0)).sum().backward()  # beyond fp16's 65504
        ds_zero.clip_grad_norm_(model, 0.0)
        grad: Tensor = optimizer.param_groups[0]["params"][0].grad
        return grad

    assert torch.isinf(mean_of_large(1.0)).all()
    torch.testing.assert_close(mean_of_large(2.0), torch.full((32,), 100_000.0), rtol=1e-3, atol=0)


@ranks(2)
def test_predivision_by_a_power_of_two_changes_no_bit() -> None:
    assert torch.equal(gradients(*sharded(0, predivide_factor=4.0)), gradients(*sharded(0)))


@ranks(2)
def test_whole_parameters_of_stage_3_have_a_limit_together() -> None:
    sizes = [n for _, p in Tiny(dim=48).named_parameters() if (n := p.numel()) <= 48]
    assert len(sizes) == 9
    model, _ = sharded(3, persistence_threshold_numel=48, model_persistence_numel=4 * 48)
    whole = [p for b in _registry.state_of(model).buckets if b.whole for p in b.params]
    assert [p.numel() for p in whole] == [48] * 4
    model, _ = sharded(3, persistence_threshold_numel=48)
    whole = [p for b in _registry.state_of(model).buckets if b.whole for p in b.params]
    assert len(whole) == 9


@ranks(2)
def test_the_backends_own_reduction_can_be_chosen() -> None:
    ordered, optimizer = sharded(1)
    train(ordered, optimizer, range(2))
    model, optimizer = sharded(1, ordered_reduction=False)
    assert isinstance(_registry.state_of(model).comm.reduce_scatter, TorchReduceScatter)
    train(model, optimizer, range(2))
    found, expected = weights(model), weights(ordered)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"reduce_op": "max"}, '"mean" or "sum"'),
        ({"predivide_factor": 0.0}, "predivide_factor=0.0: give a number above 0"),
        ({"communication_dtype": torch.int8}, "communication_dtype=torch.int8"),
        ({"model_persistence_numel": -1}, "model_persistence_numel=-1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ds_zero.ZeroConfig(**options)
