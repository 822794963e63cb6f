"""Optimizers that reduce gradients themselves under the engine: 1-bit Adam."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_comm.optim
import ds_engine
import ds_zero
from ds_checkpoint import CheckpointError
from ds_engine import ConfigError
from ds_engine.build.self_reducing import StepGuard
from engine import jobs
from harness import ranks

FREEZE = 4


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 1))


def batch_of(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    x = torch.randn(4, 8, generator=draw)
    return x, x[:, :1] * x[:, 1:2]


def engine_of(steps: int = 1, **more: Any) -> ds_engine.Engine:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": steps,
        "optimizer": {"type": "OneBitAdam", "params": {"lr": 0.02, "freeze_step": FREEZE}},
        "startup_summary": False,
        **more,
    }
    return ds_engine.initialize(net(), config)[0]


def train(engine: ds_engine.Engine, first: int, last: int, infinite_at: int = -1) -> list[float]:
    """Returns the losses of this rank in steps [first, last); in step `infinite_at` rank 1's loss is infinite."""
    losses = []
    for step in range(first, last):
        for micro in range(engine.batch.steps):
            x, y = batch_of(step, micro, dist.get_rank())
            loss = (engine(x.to(next(engine.module.parameters()).dtype)).float() - y).square().mean()
            losses.append(loss.item())
            bad = step == infinite_at and dist.get_rank() == 1
            engine.backward(loss * math.inf if bad else loss)
            engine.step()
    return losses


def weights(engine: ds_engine.Engine) -> list[Tensor]:
    return [p.detach().clone() for p in engine.module.parameters()]


@ranks(2)
@pytest.mark.parametrize(("steps", "clip"), [(1, 0.0), (2, 0.5)])
def test_the_engine_trains_like_a_plain_loop(steps: int, clip: float) -> None:
    with engine_of(steps, gradient_clipping=clip) as engine:
        losses = train(engine, 0, 10)
        norm = engine.get_global_grad_norm()
        found = weights(engine)

    model = net()
    optimizer = ds_comm.optim.OneBitAdam(model.parameters(), lr=0.02, freeze_step=FREEZE, max_grad_norm=clip)
    expected = []
    for step in range(10):
        for micro in range(steps):
            x, y = batch_of(step, micro, dist.get_rank())
            loss = (model(x) - y).square().mean()
            expected.append(loss.item())
            (loss / steps).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(found, model.parameters(), strict=True))
    assert optimizer.report is not None
    assert norm == optimizer.report.grad_norm
    assert optimizer.report.clip_factor < 1.0 if clip else optimizer.report.clip_factor == 1.0


@ranks(2)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all() -> None:
    fp16 = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 4, "hysteresis": 1}
    with engine_of(fp16=fp16) as engine:
        train(engine, 0, FREEZE + 2)
        before, scale = weights(engine), engine.loss_scale
        train(engine, FREEZE + 2, FREEZE + 3, infinite_at=FREEZE + 2)
        assert not engine.was_step_applied()
        assert engine.skipped_steps == 1
        assert engine.loss_scale == scale / 2
        assert all(torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True))
        train(engine, FREEZE + 3, FREEZE + 9)
        assert engine.was_step_applied()
        assert engine.loss_scale == scale  # doubled again after the window
        assert not all(torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True))


OTHERS = [
    {"type": "ZeroOneAdam", "params": {"lr": 0.02, "var_freeze_step": FREEZE, "local_step_clipper": 1}},
    {"type": "OneBitLamb", "params": {"lr": 0.02, "freeze_step": FREEZE}},
    {"type": "ShardedOneBitAdam", "params": {"lr": 0.02, "freeze_step": FREEZE}},
    {"type": "ShardedOneBitLamb", "params": {"lr": 0.02, "freeze_step": FREEZE}},
]


@ranks(2)
@pytest.mark.parametrize("optimizer", OTHERS, ids=lambda o: o["type"])
def test_the_other_optimizers_continue_exactly(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    with engine_of(optimizer=optimizer, gradient_clipping=1.0) as engine:
        train(engine, 0, FREEZE + 3)
        engine.save_checkpoint(tmp_path)
        expected = train(engine, FREEZE + 3, FREEZE + 8)
        after = weights(engine)
    with engine_of(optimizer=optimizer, gradient_clipping=1.0) as engine:
        engine.load_checkpoint(tmp_path)
        assert train(engine, FREEZE + 3, FREEZE + 8) == expected
        assert all(torch.equal(a, b) for a, b in zip(after, weights(engine), strict=True))


@ranks(2)
def test_a_checkpoint_between_two_synchronisations_is_refused(tmp_path: Path) -> None:
    params = {"lr": 0.02, "var_freeze_step": 2, "local_step_scaler": 1, "local_step_clipper": 4}
    with engine_of(optimizer={"type": "ZeroOneAdam", "params": params}) as engine:
        step = 0
        while engine.optimizer.synchronised:  # type: ignore[attr-defined]
            train(engine, step, step + 1)
            step += 1
        with pytest.raises(CheckpointError, match="save after a step where"):
            engine.save_checkpoint(tmp_path)
        while not engine.optimizer.synchronised:  # type: ignore[attr-defined]
            train(engine, step, step + 1)
            step += 1
        engine.save_checkpoint(tmp_path)


@ranks(2)
@pytest.mark.parametrize("saved_at", [FREEZE - 1, FREEZE + 3])
def test_a_resumed_run_continues_exactly(tmp_path: Path, saved_at: int) -> None:
    with engine_of() as engine:
        train(engine, 0, saved_at)
        engine.save_checkpoint(tmp_path)
        expected = train(engine, saved_at, saved_at + 5)
        after = weights(engine)
    with engine_of() as engine:
        train(engine, 0, 1)  # states that the checkpoint replaces
        engine.load_checkpoint(tmp_path)
        assert train(engine, saved_at, saved_at + 5) == expected
        assert all(torch.equal(a, b) for a, b in zip(after, weights(engine), strict=True))


def divided_engine() -> ds_engine.Engine:
    return engine_of(optimizer={"type": "ShardedOneBitAdam", "params": {"lr": 0.02, "freeze_step": FREEZE}})


def save_divided(folder: str) -> None:
    with divided_engine() as engine:
        train(engine, 0, FREEZE + 3)
        engine.save_checkpoint(folder)
        torch.save(engine.optimizer.residuals(), f"{folder}/own{dist.get_rank()}.pt")  # type: ignore[attr-defined]


def resume_divided(folder: str, saved_by: int) -> None:
    every = [torch.load(f"{folder}/own{rank}.pt") for rank in range(saved_by)]
    with divided_engine() as engine:
        engine.load_checkpoint(folder)
        own = engine.optimizer.residuals()  # type: ignore[attr-defined]
        for name in ("master", "exp_avg", "exp_avg_sq"):
            whole = torch.cat([state[name] for state in every])
            assert torch.equal(own[name], whole[own["start"] : own["start"] + own[name].numel()])
        assert all(math.isfinite(loss) for loss in train(engine, FREEZE + 3, FREEZE + 6))


def test_divided_states_are_divided_anew(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    jobs.on_ranks(request, 2, save_divided, folder=str(tmp_path))
    jobs.on_ranks(request, 3, resume_divided, folder=str(tmp_path), saved_by=2)


def save_after_the_freeze(folder: str) -> None:
    with engine_of() as engine:
        train(engine, 0, FREEZE + 3)
        engine.save_checkpoint(folder)
        own = engine.optimizer.residuals()  # type: ignore[attr-defined]
        torch.save(own, f"{folder}/own{dist.get_rank()}.pt")


def resume_on_other_ranks(folder: str, saved_by: int) -> None:
    every = [torch.load(f"{folder}/own{rank}.pt") for rank in range(saved_by)]
    with engine_of() as engine:
        engine.load_checkpoint(folder)
        loaded = engine.optimizer.residuals()  # type: ignore[attr-defined]
        mean = torch.stack([state["worker"] for state in every]).mean(0)
        assert torch.allclose(loaded["worker"], mean, rtol=0.0, atol=1e-7)
        assert torch.equal(loaded["server"], torch.cat([state["server"] for state in every]))
        before = weights(engine)
        losses = train(engine, FREEZE + 3, FREEZE + 8)
        assert all(math.isfinite(loss) for loss in losses)
        assert not all(torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True))


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2)])
def test_residuals_are_divided_anew_on_another_number_of_ranks(
    request: pytest.FixtureRequest, tmp_path: Path, before: int, after: int
) -> None:
    jobs.on_ranks(request, before, save_after_the_freeze, folder=str(tmp_path))
    jobs.on_ranks(request, after, resume_on_other_ranks, folder=str(tmp_path), saved_by=before)


class TwoModelParts:
    """What an `mpu` tells in a job of two model-parallel and two data-parallel ranks."""

    def __init__(self) -> None:
        rank = dist.get_rank()
        data = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        model = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        self._data, self._model = data[rank % 2], model[rank // 2]

    def get_data_parallel_group(self) -> Any:
        return self._data

    def get_data_parallel_world_size(self) -> int:
        return 2

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank() // 2

    def get_model_parallel_group(self) -> Any:
        return self._model

    def get_model_parallel_world_size(self) -> int:
        return 2

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank() % 2


@ranks(4, groups_may_stay=True)
def test_with_model_parallelism_only_data_parallel_ranks_reduce() -> None:
    ds_comm.start()
    model = net()
    with torch.no_grad():
        model[0].weight.add_(dist.get_rank() % 2)  # type: ignore[operator, union-attr]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "OneBitAdam", "params": {"lr": 0.02, "freeze_step": FREEZE}},
        "startup_summary": False,
    }
    engine, optimizer, *_ = ds_engine.initialize(model, config, mpu=TwoModelParts())
    assert optimizer.channel.world_size == 2  # type: ignore[attr-defined]
    train(engine, 0, FREEZE + 2)
    every: list[Any] = [None] * 4
    dist.all_gather_object(every, weights(engine))
    assert all(torch.equal(a, b) for a, b in zip(every[0], every[2], strict=True))
    assert not torch.equal(every[0][0], every[1][0])
    engine.destroy()


@ranks(2)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"zero_optimization": {"stage": 1}}, "stage is 1: OneBitAdam averages whole gradients"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "remove the section"),
        ({"communication_data_type": "bf16"}, "reduces gradients by itself; remove it, and set"),
        (
            {"zero_optimization": {"stage": 1}, "optimizer": OTHERS[2]},
            "stage is 1: ShardedOneBitAdam divides masters and states among the ranks itself; set it to 0",
        ),
    ],
)
def test_what_does_not_compose_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_of(**more)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"residual_dtype": "fp8"}, "residual_dtype is 'fp8'"),
        ({"reduce_dtype": "fp16"}, "reduce_dtype is 'fp16'"),
        ({"freeze_step": 0}, "freeze_step must be at least 1"),
        ({"eps_inside_sqrt": True}, "does not support this value"),
        ({"freeze_steps": 3}, "no such argument"),
    ],
)
def test_wrong_settings_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_of(optimizer={"type": "OneBitAdam", "params": params})


def test_the_scale_survives_a_checkpoint() -> None:
    optimizer = ds_comm.optim.OneBitAdam([nn.Parameter(torch.ones(3))], lr=0.1, freeze_step=1)
    guard = StepGuard(optimizer, 8.0)
    assert guard.scale(torch.tensor(2.0)).item() == 16.0
    other = StepGuard(ds_comm.optim.OneBitAdam([nn.Parameter(torch.ones(3))], lr=0.1), 8.0)
    guard.skipped_steps = 3
    other.load_state_dict(guard.state_dict())
    assert other.skipped_steps == 3


@ranks(2)
def test_a_plan_counts_the_residuals_and_communicates_nothing() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    optimizer = ds_comm.optim.OneBitAdam(model.parameters(), lr=0.02, freeze_step=1)
    calls = optimizer.traffic.num_calls
    if dist.get_rank() == 0:  # a plan is made by one rank alone
        plan = ds_zero.plan(model, torch.zeros(4, 64), optimizer=optimizer, stage=0, ranks=2)
    assert optimizer.traffic.num_calls == calls
    for _ in range(2):
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
    residuals = optimizer.residuals()
    assert residuals is not None
    held = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.numel() > 1)
    held += residuals["worker"].nbytes + residuals["server"].nbytes
    if dist.get_rank() == 0:
        assert plan.phase("forward").parts["states"] == pytest.approx(held, rel=0.02)
        assert plan.sent_bytes["step"] == pytest.approx(optimizer.compressed_state.wire_bytes, rel=0.02)
