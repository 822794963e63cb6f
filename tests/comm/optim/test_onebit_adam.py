"""1-bit Adam: the paper's equations, and everything around them that training needs."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from comm.optim.models import OneBitAdamOnAllRanks, batch, gradients, loss_of, mlp
from ds_comm.compress import ResidualError, SignCompressor
from ds_comm.exchange import wire
from ds_comm.optim import CompressionOptions, OneBitAdam, merge_states
from harness import ranks

PLAIN = CompressionOptions(compressor=SignCompressor(block_numel=64), variance_floor=0.0)


def _same_on_all_ranks(model: nn.Module) -> None:
    for p in model.parameters():
        parts = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, p.detach())
        assert all(torch.equal(part, parts[0]) for part in parts)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        optimizer.zero_grad()
        loss = loss_of(model, dist.get_rank(), step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@ranks(1, 2, 4)
def test_the_equations_of_the_paper(world_size: int) -> None:
    model, twin = mlp(), mlp()
    options: dict[str, Any] = {"lr": 1e-2, "freeze_step": 5, "weight_decay": 0.1}
    optimizer = OneBitAdam(model.parameters(), compression=PLAIN, **options)
    expected = OneBitAdamOnAllRanks(
        [p.detach() for p in twin.parameters()], world_size, block_numel=64, **options
    )
    for step in range(8 if world_size > 1 else 5):
        expected.step([gradients(twin, rank, step) for rank in range(world_size)])
        _train(model, optimizer, step, step + 1)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    _same_on_all_ranks(model)


@ranks(2)
def test_the_first_phase_is_adamw_over_mean_gradients(world_size: int) -> None:
    model, twin = mlp(), mlp()
    optimizer = OneBitAdam(model.parameters(), lr=1e-2, weight_decay=0.1, freeze_step=100)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(10):
        _train(model, optimizer, step, step + 1)
        for p, *grads in zip(twin.parameters(), *(gradients(twin, r, step) for r in range(2)), strict=True):
            p.grad = torch.stack(grads).mean(0)
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@ranks(2)
def test_the_first_phase_in_bf16_sends_half(world_size: int) -> None:
    model, twin = mlp(), mlp()
    halved = CompressionOptions(reduce_dtype=torch.bfloat16)
    optimizer = OneBitAdam(model.parameters(), lr=1e-2, freeze_step=2, compression=halved)
    before = optimizer.traffic.num_bytes
    _train(model, optimizer, 0, 1)
    both = zip(model.parameters(), gradients(twin, 0, 0), gradients(twin, 1, 0), strict=True)
    for p, first, second in both:
        rounded = (first.bfloat16() + second.bfloat16()).float() / 2
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * rounded)
    numel = sum(p.numel() for p in model.parameters())
    flags = 4 * (3 + len(list(model.parameters())))  # what all ranks agree on before a step
    sent = wire.all_reduce_bytes(2 * numel, 2)
    assert sent <= optimizer.traffic.num_bytes - before <= sent + wire.all_reduce_bytes(2 * flags, 2)
    _train(model, optimizer, 1, 4)
    _same_on_all_ranks(model)
    with pytest.raises(ValueError, match="reduce_dtype must be"):
        CompressionOptions(reduce_dtype=torch.float16)


@ranks(2)
def test_two_collectives_and_the_bytes_of_the_formula(world_size: int) -> None:
    model = mlp(width=700)
    optimizer = OneBitAdam(model.parameters(), lr=1e-3, freeze_step=2)
    _train(model, optimizer, 0, 3)
    before = copy.copy(optimizer.traffic)
    _train(model, optimizer, 3, 4)
    small = wire.all_reduce_bytes(16, world_size)  # whether all gradients are finite, and their norm
    assert optimizer.traffic.num_calls - before.num_calls == 3
    assert optimizer.traffic.num_bytes - before.num_bytes == optimizer.compressed_state.wire_bytes + small
    dense = wire.all_reduce_bytes(sum(p.nbytes for p in model.parameters()), world_size)
    assert optimizer.compressed_state.wire_bytes < 1.03 * dense / 32


@ranks(2)
def test_clipping_before_and_after_compression(world_size: int) -> None:
    for freeze_step in (100, 1):
        model, twin = mlp(), mlp()
        clipped = OneBitAdam(
            model.parameters(), lr=1e-2, freeze_step=freeze_step, max_grad_norm=0.05, compression=PLAIN
        )
        expected = OneBitAdamOnAllRanks(
            [p.detach() for p in twin.parameters()], world_size, 1e-2, freeze_step, block_numel=64
        )
        for step in range(4):
            grads = [gradients(twin, rank, step) for rank in range(world_size)]
            norms = [math.sqrt(sum(float(g.square().sum()) for g in own)) for own in grads]
            if step < freeze_step:
                mean = [torch.stack(own).mean(0) for own in zip(*grads, strict=True)]
                norm = math.sqrt(sum(float(g.square().sum()) for g in mean))
            else:
                norm = math.sqrt(sum(n * n for n in norms) / world_size)
            factor = min(1.0, 0.05 / (norm + 1e-6))
            assert factor < 1.0
            expected.step([[g * factor for g in own] for own in grads])
            _train(model, clipped, step, step + 1)
            assert clipped.report is not None
            assert clipped.report.grad_norm == pytest.approx(norm, rel=1e-4)
            assert clipped.report.clip_factor == pytest.approx(factor, rel=1e-4)
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
                q.detach().copy_(p)  # or the losses of both drift apart by rounding


@ranks(2)
def test_accumulated_gradients_are_reduced_once(world_size: int) -> None:
    model, twin = mlp(), mlp()
    one = OneBitAdam(model.parameters(), lr=1e-2, freeze_step=2)
    two = OneBitAdam(twin.parameters(), lr=1e-2, freeze_step=2)
    for step in range(5):
        one.zero_grad()
        calls = one.traffic.num_calls
        for micro in range(3):
            (loss_of(model, dist.get_rank(), 3 * step + micro) / 3).backward()
        assert one.traffic.num_calls == calls
        one.step()
        two.zero_grad()
        sum(loss_of(twin, dist.get_rank(), 3 * step + micro) / 3 for micro in range(3)).backward()  # type: ignore[union-attr]
        two.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@ranks(2)
@pytest.mark.parametrize("bad_step", [2, 3, 5])
def test_an_overflow_is_skipped_on_all_ranks(bad_step: int) -> None:
    """At the end of the first phase, at the first compressed step, later: nothing but the batch is lost."""
    model, twin = mlp(), mlp()
    optimizer = OneBitAdam(model.parameters(), lr=1e-2, freeze_step=3)
    clean = OneBitAdam(twin.parameters(), lr=1e-2, freeze_step=3)
    for step in range(8):
        optimizer.zero_grad()
        loss_of(model, dist.get_rank(), step).backward()
        if step == bad_step:
            first = next(model.parameters())
            assert first.grad is not None
            if dist.get_rank() == 1:
                first.grad[0, 0] = math.inf
        optimizer.step()
        assert optimizer.report is not None and optimizer.report.skipped == (step == bad_step)
        if step != bad_step:
            _train(twin, clean, step, step + 1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    ours, theirs = optimizer.compressed_state.feedback, clean.compressed_state.feedback
    assert ours is not None and theirs is not None
    assert torch.equal(ours.worker, theirs.worker) and torch.equal(ours.server, theirs.server)


@ranks(2)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_of_16_bits_with_a_loss_scale(dtype: torch.dtype) -> None:
    model = mlp(dtype=dtype)
    optimizer = OneBitAdam(model.parameters(), lr=1e-3, freeze_step=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14 if dtype == torch.float16 else 1.0)
    skipped, losses = 0, []
    for step in range(30):
        optimizer.zero_grad()
        loss = loss_of(model, dist.get_rank(), step, dtype)
        scaler.scale(loss).backward()
        if step in (4, 12) and dist.get_rank() == 0:
            next(iter(model.parameters())).grad.fill_(math.inf)  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.report is not None
        skipped += optimizer.report.skipped
        losses.append(loss.item())
    assert skipped == 2
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    for p in model.parameters():
        assert p.dtype == dtype
        assert torch.equal(p, optimizer.state[p]["master"].to(dtype))
    _same_on_all_ranks(model)


@ranks(2)
def test_frozen_unused_sparse_and_uneven() -> None:
    torch.manual_seed(dist.get_rank())  # other values on each rank: those of the first rank count
    embedding = nn.Embedding(50, 20, sparse=True)
    model, unused, frozen = mlp(dist.get_rank()), nn.Linear(3, 3), nn.Linear(2, 2)
    frozen.requires_grad_(False)
    before = unused.weight.detach().clone()
    params = [*embedding.parameters(), *model.parameters(), *unused.parameters(), *frozen.parameters()]
    optimizer = OneBitAdam(params, lr=1e-2, freeze_step=4)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        if dist.get_rank() == 0 or step % 3:  # rank 1 has no batch in every third step
            x, y = batch(dist.get_rank(), step)
            rows = torch.arange(16) % 25 if dist.get_rank() == 0 else torch.arange(16) % 10
            loss = (model(x + embedding(rows)) - y).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    dist.broadcast(before, 0)
    assert torch.equal(unused.weight, before)
    assert frozen.weight not in optimizer.state
    assert int(optimizer.state[unused.weight]["step"]) == 0
    for module in (model, embedding):
        _same_on_all_ranks(module)


@ranks(2)
def test_layers_that_are_unfrozen_later_have_a_first_phase_of_their_own() -> None:
    model = mlp()
    for p in model[0].parameters():
        p.requires_grad_(False)
    optimizer = OneBitAdam(model.parameters(), lr=1e-2, freeze_step=3)
    _train(model, optimizer, 0, 6)
    feedback = optimizer.compressed_state.feedback
    assert feedback is not None
    sizes = [feedback.numel]
    lost = feedback.worker.abs().sum()
    for p in model[0].parameters():
        p.requires_grad_(True)
    _train(model, optimizer, 6, 9)
    assert int(optimizer.state[model[0].weight]["step"]) == 3
    assert optimizer.compressed_state.feedback is feedback
    _train(model, optimizer, 9, 10)
    feedback = optimizer.compressed_state.feedback
    assert feedback is not None and feedback.numel > sizes[0] and lost > 0
    _train(model, optimizer, 10, 14)
    _same_on_all_ranks(model)


def _saved(optimizer: OneBitAdam) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@ranks(2)
@pytest.mark.parametrize("at", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_exact(at: int, dtype: torch.dtype) -> None:
    model = mlp(dtype=dtype)
    optimizer = OneBitAdam(model.parameters(), lr=1e-2, freeze_step=3)

    def train(m: nn.Module, o: OneBitAdam, first: int, last: int) -> None:
        for step in range(first, last):
            o.zero_grad()
            loss_of(m, dist.get_rank(), step, dtype).backward()
            o.step()

    train(model, optimizer, 0, at)
    weights, state = copy.deepcopy(model.state_dict()), _saved(optimizer)
    train(model, optimizer, at, 10)
    again = mlp(seed=1, dtype=dtype)
    again.load_state_dict(weights)
    resumed = OneBitAdam(again.parameters(), lr=1.0, freeze_step=3)
    resumed.load_state_dict(state)
    train(again, resumed, at, 10)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@ranks(4)
def test_resuming_on_another_number_of_ranks() -> None:
    """Four ranks save; two and one go on from the merged state, and what was not sent yet is not lost."""
    model = mlp()
    optimizer = OneBitAdam(model.parameters(), lr=1e-2, freeze_step=3)
    losses = _train(model, optimizer, 0, 30)
    states: list[Any] = [None] * 4
    dist.all_gather_object(states, optimizer.state_dict())
    merged, whole = merge_states(states), optimizer.whole_state_dict()
    for name in ("worker", "server"):
        torch.testing.assert_close(merged["error_feedback"][name], whole["error_feedback"][name])
    for size in (2, 1):
        group = dist.new_group(list(range(size)))
        if dist.get_rank() < size:
            smaller = mlp()
            smaller.load_state_dict(model.state_dict())
            resumed = OneBitAdam(smaller.parameters(), lr=1e-2, freeze_step=3, group=group)
            with pytest.raises(ResidualError, match="of 4, but this is rank"):
                resumed.load_state_dict(optimizer.state_dict())
            resumed.load_state_dict(whole)
            more = _train(smaller, resumed, 30, 60)
            assert sum(more) < sum(losses)
            parts = [torch.empty_like(smaller[0].weight) for _ in range(size)]
            dist.all_gather(parts, smaller[0].weight.detach(), group=group)
            assert all(torch.equal(part, parts[0]) for part in parts)
        dist.destroy_process_group(group)


@ranks(2)
def test_a_state_of_torch_adamw_loads() -> None:
    model = mlp()
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_of(model, 0, 0).backward()
    plain.step()
    optimizer = OneBitAdam(model.parameters(), lr=1e-2, freeze_step=3)
    optimizer.load_state_dict(plain.state_dict())
    for p in model.parameters():
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], plain.state[p]["exp_avg_sq"])
    _train(model, optimizer, 1, 5)


@ranks(4)
def test_over_subgroups() -> None:
    """Two replicas of two halves, as in a pipeline: each half has its own group."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = dist.get_rank() % 2
    model = mlp(seed=mine)
    optimizer = OneBitAdam(model.parameters(), lr=1e-2, freeze_step=3, group=groups[mine])
    _train(model, optimizer, 0, 8)
    parts = [torch.empty_like(model[0].weight) for _ in range(4)]
    dist.all_gather(parts, model[0].weight.detach())
    assert torch.equal(parts[0], parts[2]) and torch.equal(parts[1], parts[3])
    assert not torch.equal(parts[0], parts[1])
    with pytest.raises(ValueError, match=r"rank . is not in the process group"):
        OneBitAdam(mlp().parameters(), group=groups[1 - mine])
    for group in groups:
        if dist.get_rank() in dist.get_process_group_ranks(group):
            dist.destroy_process_group(group)


@ranks(2)
def test_formats_closures_and_schedulers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 1)).to(
        memory_format=torch.channels_last
    )
    optimizer = OneBitAdam(
        [
            {"params": model[0].parameters(), "weight_decay": 0.1},
            {"params": model[2].parameters(), "lr": 1e-3},
        ],
        lr=1e-2,
        freeze_step=2,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    x = torch.randn(8, 2, 4, 4)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss.item()

    losses = []
    for _ in range(12):
        losses.append(optimizer.step(closure))
        schedule.step()
    assert losses[-1] is not None and losses[0] is not None and losses[-1] < losses[0]
    _same_on_all_ranks(model)


def test_a_single_process_needs_no_process_group() -> None:
    model = mlp()
    optimizer = OneBitAdam(model.parameters(), lr=1e-2, freeze_step=3)
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        loss = loss_of(model, 0, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert optimizer.traffic.num_bytes == 0


def test_arguments() -> None:
    assert OneBitAdam.reduces_gradients is True
    params = list(mlp().parameters())
    OneBitAdam(params, comm_backend_name="nccl", cuda_aware=False, amsgrad=False, eps_inside_sqrt=False)
    for arguments, message in (
        ({"amsgrad": True}, "OneBitAdam: amsgrad=True is not supported"),
        ({"freeze_step": 0}, "freeze_step must be at least 1, but is 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must not be negative, but is -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\)"),
        ({"lr": -1.0}, "lr must not be negative, but is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            OneBitAdam(params, **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected argument 'freeze_steps'"):
        OneBitAdam(params, freeze_steps=3)
    with pytest.warns(UserWarning, match="comm_backend_name='smoke' has no effect"):
        OneBitAdam(params, comm_backend_name="smoke")
    with pytest.raises(ValueError, match="variance_floor must lie in"):
        CompressionOptions(variance_floor=2.0)
