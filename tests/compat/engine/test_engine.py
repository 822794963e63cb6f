"""What scripts call on DeepSpeed's engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed
from harness import ranks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(24, 24) for _ in range(3)])
        self.frozen = nn.Parameter(torch.ones(24), requires_grad=False)
        self.head = nn.Linear(24, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x)) * self.frozen
        return (self.head(x) - y).square().mean()


def config(stage: int, accumulation: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
        "zero_optimization": {
            "stage": stage,
            **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
        },
        "startup_summary": False,
        **more,
    }


def batch(step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(4, 24, generator=generator)
    return x, x.sum(dim=1, keepdim=True)


def make(stage: int, accumulation: int = 1, **more: Any) -> deepspeed.DeepSpeedEngine:
    torch.manual_seed(0)
    model = Net()
    engine, optimizer, loader, schedule = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config(stage, accumulation, **more)
    )
    assert optimizer is engine.optimizer
    assert loader is None and schedule is None
    return engine


def plain(micro_steps: int, accumulation: int, ranks: int) -> list[list[float]]:
    """Losses of every rank, as one process computes them."""
    torch.manual_seed(0)
    model = Net()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    found: list[list[float]] = [[] for _ in range(ranks)]
    for step in range(micro_steps):
        for rank in range(ranks):
            loss = model(*batch(step, rank))
            (loss / accumulation / ranks).backward()
            found[rank].append(loss.item())
        if (step + 1) % accumulation == 0:
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return found


@ranks(2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_are_those_of_one_process(stage: int, accumulation: int) -> None:
    engine = make(stage, accumulation)
    losses = []
    for step in range(6):
        loss = engine(*batch(step, dist.get_rank()))
        assert engine.is_gradient_accumulation_boundary() == ((step + 1) % accumulation == 0)
        engine.backward(loss)
        engine.step()
        assert engine.was_step_applied() == ((step + 1) % accumulation == 0)
        losses.append(loss.item())
    assert losses == pytest.approx(plain(6, accumulation, 2)[dist.get_rank()], rel=1e-5)
    assert (engine.global_steps, engine.micro_steps) == (6 // accumulation, 6)
    assert engine.global_samples == 6 * 4 * 2
    engine.destroy()


@ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_backward_without_the_engine_is_averaged_over_micro_batches(stage: int) -> None:
    engine = make(stage, 2)
    losses = []
    for step in range(4):
        loss = engine(*batch(step, dist.get_rank()))
        loss.backward()
        engine.step()
        losses.append(loss.item())
    assert losses == pytest.approx(plain(4, 2, 2)[dist.get_rank()], rel=1e-5)
    engine.destroy()


@ranks(1)
def test_a_boundary_that_the_caller_sets_holds_until_the_next_word() -> None:
    """What Accelerate does: it counts micro-batches itself, and steps at the boundary only."""
    engine = make(2, 2)
    losses = []
    for step in range(4):
        last = step % 2 == 1
        engine.set_gradient_accumulation_boundary(is_boundary=last)
        loss = engine(*batch(step))
        engine.backward(loss)
        if last:
            engine.step()
        losses.append(loss.item())
    assert losses == pytest.approx(plain(4, 2, 1)[0], rel=1e-5)
    assert engine.global_steps == 2
    engine.destroy()


@ranks(2)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_sync(stage: int) -> None:
    engine = make(stage, 2)
    for step in range(2):
        loss = engine(*batch(step, dist.get_rank()))
        if step == 0:
            with engine.no_sync():
                engine.backward(loss)
                with pytest.raises(AssertionError, match="no_sync"):
                    engine.step()
        else:
            engine.backward(loss)
        engine.step()
    after = engine(*batch(2, dist.get_rank())).item()
    assert after == pytest.approx(plain(3, 2, 2)[dist.get_rank()][2], rel=1e-5)
    engine.destroy()


@ranks(1)
def test_attributes_and_answers() -> None:
    engine = make(3, 2, gradient_clipping=0.5, steps_per_print=1000)
    assert isinstance(engine, nn.Module) and isinstance(engine, deepspeed.DeepSpeedEngine)
    assert engine.zero_optimization() and engine.zero_optimization_stage() == 3
    assert engine.zero_optimization_partition_gradients() and engine.zero_optimization_partition_weights()
    assert engine.gradient_clipping() == 0.5
    assert not engine.fp16_enabled() and not engine.bfloat16_enabled()
    assert engine.get_batch_info() == (8, 4, 2)
    assert engine.get_lr() == [1e-2] and engine.get_mom() == [(0.9, 0.999)]
    assert engine.config["zero_optimization"]["stage"] == 3  # Trainer reads the dict
    assert (
        engine.device.type == "cpu"
        and engine.local_rank == engine.global_rank == 0
        and engine.world_size == 1
    )
    assert engine.frozen is engine.module.frozen  # what it lacks is the module's
    assert next(iter(dict(engine.named_parameters()))) == "module.frozen"
    assert not engine.monitor.enabled and not engine.wall_clock_breakdown()
    assert engine.optimizer.loss_scale == engine.optimizer.cur_scale == 1.0 and not engine.optimizer.overflow
    assert isinstance(engine.optimizer, torch.optim.Optimizer)
    assert isinstance(engine.optimizer, deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3)
    engine.set_lr(0.5)
    assert engine.get_lr() == [0.5] and engine.basic_optimizer.param_groups[0]["lr"] == 0.5
    engine.set_train_batch_size(12)
    assert engine.gradient_accumulation_steps() == 3
    with pytest.raises(ValueError, match="multiple"):
        engine.set_train_batch_size(13)
    engine.eval()
    assert not engine.module.training and not engine.training
    assert engine.train() is not None and engine.module.training
    with pytest.raises(AttributeError, match="no_such"):
        _ = engine.no_such
    engine.lr_scheduler = None
    engine.global_steps = 5
    assert engine._engine.global_steps == 5
    engine.destroy()


@ranks(1)
def test_fp32_at_stage_0_gives_the_optimizer_itself() -> None:
    model = Net()
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    given = config(0)
    del given["optimizer"]
    schedule = torch.optim.lr_scheduler.StepLR(mine, 1)
    engine, optimizer, _, returned = deepspeed.initialize(
        model=model, optimizer=mine, config=given, lr_scheduler=schedule
    )
    assert optimizer is mine and engine.basic_optimizer is mine and returned is schedule
    engine.backward(engine(*batch(0)))
    engine.step()
    assert engine.get_lr() == [pytest.approx(0.01)]
    engine.destroy()


@ranks(2)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_engine_without_optimizer_evaluates(stage: int) -> None:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        wanted = model(*batch(0)).item()
    given = config(stage)
    del given["optimizer"]
    engine, optimizer, _, _ = deepspeed.initialize(model=model, config_params=given)
    assert optimizer is None
    engine.eval()
    with torch.no_grad():
        assert engine(*batch(0)).item() == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(AssertionError, match="optimizer"):
        engine.step()
    engine.destroy()


@ranks(2)
@pytest.mark.parametrize("stage", [1, 3])
def test_checkpoints_have_the_meaning_of_deepspeeds(stage: int, tmp_path) -> None:
    engine = make(stage)
    assert engine.load_checkpoint(tmp_path) == (None, None)
    for step in range(2):
        engine.backward(engine(*batch(step, dist.get_rank())))
        engine.step()
    assert engine.save_checkpoint(str(tmp_path), client_state={"epoch": 3}) is True
    assert engine.save_checkpoint(str(tmp_path), tag="other", save_latest=False)
    assert (tmp_path / "latest").read_text() == "global_step2"
    assert (tmp_path / "zero_to_fp32.py").is_file()
    wanted = engine(*batch(5)).item()
    engine.destroy()

    fresh = make(stage)
    path, client = fresh.load_checkpoint(str(tmp_path))
    assert path.startswith(str(tmp_path)) and client == {"epoch": 3} and fresh.global_steps == 2
    assert fresh(*batch(5)).item() == wanted
    with pytest.raises(FileNotFoundError, match="missing"):
        fresh.load_checkpoint(str(tmp_path), tag="missing")
    fresh.destroy()

    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    values = get_fp32_state_dict_from_zero_checkpoint(tmp_path, tag="other")
    model = Net()
    model.load_state_dict(values)
    assert model(*batch(5)).item() == pytest.approx(wanted, rel=1e-6)


@ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_whole_weights(stage: int, tmp_path) -> None:
    engine = make(stage, zero_optimization={"stage": stage})
    first = dist.get_rank() == 0
    torch.manual_seed(0)
    wanted = Net().state_dict()
    if stage == 3:
        values = engine._zero3_consolidated_16bit_state_dict()
        assert (values is not None) == first
        assert (
            engine.save_16bit_model(str(tmp_path)) is False
        )  # stage3_gather_16bit_weights_on_model_save is off
    else:
        values = engine.module_state_dict()
        with pytest.raises(ValueError, match="ZeRO-3"):
            engine._zero3_consolidated_16bit_state_dict()
        assert engine.save_16bit_model(str(tmp_path), exclude_frozen_parameters=True)
        assert set(torch.load(tmp_path / "pytorch_model.bin")) == set(wanted) - {"frozen"}
    if values is not None:
        assert list(values) == list(wanted)
        assert all(torch.equal(values[name], wanted[name]) for name in wanted)
    doubled = {name: value * 2 for name, value in wanted.items()}
    engine.load_module_state_dict(doubled)
    with deepspeed.zero.GatheredParameters(engine.module.head.weight):
        assert torch.equal(engine.module.head.weight, doubled["head.weight"])
    with pytest.raises(ValueError, match="missing"):
        engine.load_module_state_dict({"head.weight": doubled["head.weight"]})
    engine.destroy()


def test_arguments_for_the_schedule() -> None:
    """`engine.step(lr_kwargs)`, as code with ReduceLROnPlateau calls it."""
    torch.manual_seed(0)
    model = Net()
    engine, _, _, schedule = deepspeed.initialize(
        model=model,
        config=config(2, accumulation=2),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=0, factor=0.5
        ),
    )
    rates = []
    for metric in (1.0, 1.0, 2.0, 2.0, 0.5, 0.5):  # each of two micro-batches; the boundary's counts
        engine.backward(engine(*batch(0)))
        engine.step({"metrics": metric})
        rates.append(engine.get_lr()[0])
    assert rates == [1e-2, 1e-2, 1e-2, 5e-3, 5e-3, 5e-3]
    assert schedule.num_bad_epochs == 0


@ranks(1, 2)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_masters_begin_as_what_the_model_computes_with(stage: int) -> None:
    """As in the original, or losses of one script would part at the first update."""
    from deepspeed.utils import safe_get_full_fp32_param

    engine = make(stage, bf16={"enabled": True})
    torch.manual_seed(0)
    for (name, param), exact in zip(engine.module.named_parameters(), Net().parameters(), strict=True):
        if name != "frozen":
            master = safe_get_full_fp32_param(param)
            assert master.dtype == torch.float32 and torch.equal(master, exact.bfloat16().float())
            assert not param.ndim > 1 or not torch.equal(master, exact)


@ranks(1, 2)
def test_states_go_away_and_come_back() -> None:
    """As DeepSpeed's users call it between the phases of reinforcement learning."""
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum

    straight, engine = make(3), make(3)
    for step in range(4):
        losses = []
        for each in (straight, engine):
            loss = each(*batch(step))
            each.backward(loss)
            each.step()
            losses.append(loss.item())
        assert losses[0] == losses[1]
        include = [OffloadStateTypeEnum.optim_states, OffloadStateTypeEnum.contiguous_grad_buffer] * (
            step % 2
        )
        engine.offload_states(
            include=include or None, device=OffloadDeviceEnum.cpu, pin_memory=False, non_blocking=step > 1
        )
        with pytest.raises(RuntimeError, match=r"call engine.reload_states\(\) first"):
            engine.step()
        engine.reload_states(non_blocking=step > 1)
