"""The engine is the plain loop: same losses, same parameters, and what happens at and off the boundary."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import ds_comm
import ds_core.optim
import ds_engine
import ds_offload
import ds_zero
from engine import jobs
from harness import ranks

STAGES = [0, 1, 2, 3]


@pytest.fixture(autouse=True)
def _no_group_left() -> Iterator[None]:
    """`initialize` starts a process group in the process of pytest, for tests of a single rank."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def plain_training(steps: int, clip: float, accumulation: int = 2) -> tuple[list[float], dict[str, Tensor]]:
    """What the engine has to equal on one rank, in plain PyTorch."""
    model = jobs.net()
    optimizer = ds_core.optim.FusedAdam(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1
    )
    schedule = ds_engine.schedules.WarmupLR(optimizer, warmup_num_steps=4, warmup_type="linear")
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 + step)
        tokens = torch.randint(0, 11, (16,), generator=generator).chunk(accumulation)
        wanted = torch.randint(0, 11, (16,), generator=generator).chunk(accumulation)
        for x, y in zip(tokens, wanted, strict=True):
            loss = jobs.loss_of(model, x, y)
            (loss / accumulation).backward()
            losses.append(loss.item())
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return losses, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_rank_equals_plain_pytorch_bitwise(stage: int, accumulation: int) -> None:
    losses, state = plain_training(6, clip=0, accumulation=accumulation)
    engine = jobs.engine(stage, gradient_clipping=0, gradient_accumulation_steps=accumulation)
    assert jobs.train(engine, 6) == losses
    engine.destroy()
    for name, value in engine.module.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_equals_torchs_to_rounding(stage: int) -> None:
    losses, _ = plain_training(6, clip=0.05)
    engine = jobs.engine(stage, gradient_clipping=0.05)
    assert jobs.train(engine, 6) == pytest.approx(losses, rel=1e-5)
    norm = engine.get_global_grad_norm()
    assert norm is not None and norm > 0.05  # so it did clip
    assert losses != pytest.approx(plain_training(6, clip=0)[0], rel=1e-5)  # and clipping matters


@ranks(2)
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_stages_agree_bitwise_on_two_ranks(offload: str) -> None:
    runs = {}
    for stage in STAGES:
        zero = {"stage": stage, "accumulation_plan": "local", "offload_optimizer": {"device": offload}}
        engine = jobs.engine(zero_optimization=zero)
        losses = jobs.train(engine, 5)
        engine.destroy()
        runs[stage] = losses, engine.module.state_dict()
    for stage in STAGES[1:]:
        assert runs[stage][0] == runs[0][0]
        for name, value in runs[stage][1].items():
            assert torch.equal(value, runs[0][1][name]), f"{name} in stage {stage}"


def test_counters_boundary_and_rates() -> None:
    engine = jobs.engine(1)
    seen = []
    for tokens, wanted in jobs.micro_batches(engine, 3):
        at_boundary = engine.is_gradient_accumulation_boundary()
        before = engine.get_lr()
        scaled = engine.backward(loss := jobs.loss_of(engine, tokens, wanted))
        assert scaled.item() == pytest.approx(loss.item() / 2) and not scaled.requires_grad
        engine.step()
        seen.append((at_boundary, engine.micro_steps, engine.global_steps, engine.global_samples, before[0]))
    assert [row[:4] for row in seen] == [
        (False, 1, 0, 0),
        (True, 2, 1, 16),
        (False, 3, 1, 16),
        (True, 4, 2, 32),
        (False, 5, 2, 32),
        (True, 6, 3, 48),
    ]
    assert [row[4] for row in seen] == [0, 0, 0, 0, 0.0025, 0.0025]
    assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (16, 8)
    assert engine.gradient_accumulation_steps() == 2
    assert engine.skipped_steps == 0


def test_the_norm_is_from_before_clipping_and_absent_before_the_first_step() -> None:
    engine = jobs.engine(2, gradient_clipping=1e-3)
    assert engine.get_global_grad_norm() is None
    jobs.train(engine, 1)
    norm = engine.get_global_grad_norm()
    assert norm is not None and norm > 1e-2


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(stage: int) -> None:
    engine = jobs.engine(stage, gradient_clipping=0)
    lines: list[str] = []
    engine.progress.write = lines.append
    jobs.train(engine, 3)
    before = ds_zero.full_state_dict(engine.module), engine.get_lr()
    for k, (tokens, wanted) in enumerate(jobs.micro_batches(engine, 1)):
        factor = math.inf if engine.world.rank == 1 and k == 0 else 1.0
        engine.backward(jobs.loss_of(engine, tokens, wanted) * factor)
        engine.step()
    assert (engine.skipped_steps, engine.global_steps, engine.global_samples) == (1, 4, 64)
    assert not math.isfinite(engine.get_global_grad_norm() or 0.0)
    after = ds_zero.full_state_dict(engine.module), engine.get_lr()
    assert before[1] == after[1]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0] if name != "seen")
    assert [("skipped on all ranks" in line) for line in lines] == ([True] if engine.world.rank == 0 else [])
    # and training goes on from there
    assert all(math.isfinite(loss) for loss in jobs.train(engine, 2))
    assert engine.skipped_steps == 1
    assert math.isfinite(engine.get_global_grad_norm() or math.inf)


def test_bf16_computes_low_and_keeps_fp32_masters() -> None:
    seen: list[torch.dtype] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].register_forward_hook(lambda _, args, out: seen.extend([args[0].dtype, out.dtype]))
    start = model[0].weight.detach().clone()
    engine, *_ = ds_engine.initialize(model=model, config=jobs.config(2, bf16={"enabled": True}))
    master = ds_zero.full_state_dict(engine.module)["0.weight"]
    assert torch.equal(master, start)  # the values from before the cast
    engine.backward(engine(torch.randn(8, 4)).square().mean())
    engine.step()
    assert set(seen) == {torch.bfloat16}
    assert engine.module[0].weight.dtype == torch.bfloat16


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_learns(stage: int) -> None:
    engine = jobs.engine(stage, bf16={"enabled": True}, scheduler=None)
    first = jobs.train(engine, 1)
    for _ in range(30):
        jobs.train(engine, 1)
    assert jobs.train(engine, 1)[0] < 0.5 * first[0]


class TestConfigReachesZero:
    """Each key of zero_optimization does something."""

    def made(self, **zero: Any) -> ds_zero.Summary:
        return ds_zero.describe(jobs.engine(zero_optimization=zero).module)

    def test_stage(self) -> None:
        for stage in STAGES:
            assert self.made(stage=stage).stage == stage

    def test_accumulation_plan(self) -> None:
        for stage in STAGES:
            assert self.made(stage=stage).accumulation == ("local" if stage < 2 else "sharded")
            for plan in ("local", "sharded"):
                assert self.made(stage=stage, accumulation_plan=plan).accumulation == plan

    def test_reduce_bucket_size(self) -> None:
        assert self.made(stage=1, reduce_bucket_size=50).num_buckets > self.made(stage=1).num_buckets

    def test_persistence_threshold(self) -> None:
        assert self.made(stage=3, stage3_param_persistence_threshold=0).num_gathered_buckets > 0
        assert self.made(stage=3, stage3_param_persistence_threshold=1000).num_gathered_buckets == 0

    def test_the_rest_by_what_shard_is_given(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[dict[str, Any]] = []
        shard = ds_zero.shard

        def spy(*args: Any, **kwargs: Any) -> Any:
            given.append(kwargs)
            return shard(*args, **kwargs)

        monkeypatch.setattr(ds_zero, "shard", spy)
        jobs.engine(3)
        jobs.engine(zero_optimization={"stage": 3, "stage3_prefetch": False})
        jobs.engine(
            zero_optimization={"stage": 2, "overlap_publish": True},
            gradient_accumulation_steps=4,
        )
        jobs.engine(zero_optimization={"stage": 1, "offload_optimizer": {"device": "cpu"}})
        assert [g["config"].prefetch for g in given] == [True, False, True, True]
        assert [g["config"].overlap_publish for g in given] == [False, False, True, False]
        assert [g["config"].accumulation_steps for g in given] == [2, 2, 4, 2]
        assert [type(g.get("store")) for g in given] == [type(None)] * 3 + [ds_offload.HostStore]

    def test_offload_steps_on_the_host(self) -> None:
        engine = jobs.engine(zero_optimization={"stage": 1, "offload_optimizer": {"device": "cpu"}})
        assert type(engine.optimizer) is ds_offload.CPUAdam


class TestSeed:
    def test_it_repeats_random_numbers(self) -> None:
        drawn = []
        for _ in range(2):
            jobs.engine(seed=0)
            model = jobs.net()
            ds_engine.initialize(model=model, config=jobs.config(seed=7))
            drawn.append((torch.rand(1).item(), random.random()))
        assert drawn[0] == drawn[1]

    def test_without_it_generators_are_left_alone(self) -> None:
        torch.manual_seed(5)
        model = jobs.Net()
        state = torch.get_rng_state()
        ds_engine.initialize(model=model, config=jobs.config())
        assert torch.equal(torch.get_rng_state(), state)


@ranks(2)
def test_the_seed_differs_between_ranks_and_rank_0s_weights_win() -> None:
    engine, *_ = ds_engine.initialize(model=jobs.net(seed=dist.get_rank()), config=jobs.config(2, seed=7))
    drawn = [torch.empty(1) for _ in range(2)]
    dist.all_gather(drawn, torch.rand(1))
    assert drawn[0] != drawn[1]
    engine.destroy()
    assert torch.equal(engine.module.scale, jobs.net(0).scale)
    assert torch.equal(engine.module.embed.weight, jobs.net(0).embed.weight)


class TestInitialize:
    def test_everything_may_be_passed_as_an_object_or_a_function(self) -> None:
        raw = {k: v for k, v in jobs.config(1).items() if k not in ("optimizer", "scheduler")}
        model = jobs.net()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        engine, same, loader, scheduler = ds_engine.initialize(
            model=model, config=raw, optimizer=optimizer, lr_scheduler=schedule
        )
        assert same is optimizer and scheduler is schedule and loader is None
        jobs.train(engine, 2)
        assert engine.get_lr() == [0.125]
        engine, made, _, scheduler = ds_engine.initialize(
            model=jobs.net(),
            config=raw,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.25),
            lr_scheduler=lambda opt: ds_engine.schedules.WarmupLR(opt, warmup_num_steps=2),
        )
        assert isinstance(made, torch.optim.SGD) and made.defaults["lr"] == 0.25
        assert isinstance(scheduler, ds_engine.schedules.WarmupLR)

    def test_model_parameters_decide_what_is_trained(self) -> None:
        model = jobs.net()
        groups = [{"params": list(model.inner.parameters()), "lr": 0.3}]
        engine, optimizer, *_ = ds_engine.initialize(
            model=model, config=jobs.config(scheduler=None), model_parameters=groups
        )
        assert engine.get_lr() == [0.3] and len(optimizer.param_groups[0]["params"]) == 6

    @pytest.mark.parametrize("stage", [0, 3])
    def test_a_deferred_model_is_the_same_model(self, stage: int) -> None:
        wanted = jobs.train(jobs.engine(stage), 3)
        torch.manual_seed(0)
        with ds_zero.deferred_init():
            model = jobs.Net()
        assert model.embed.weight.is_meta
        engine, *_ = ds_engine.initialize(model=model, config=jobs.config(stage))
        assert jobs.train(engine, 3) == wanted

    def test_training_data_comes_in_micro_batches(self) -> None:
        data = TensorDataset(torch.arange(40) % 11, torch.arange(40) % 11)
        engine, _, loader, _ = ds_engine.initialize(
            model=jobs.net(), config=jobs.config(), training_data=data
        )
        assert loader is not None
        batches = list(loader)
        assert [len(x) for x, _ in batches] == [8] * 5
        engine.backward(jobs.loss_of(engine, *batches[0]))

    @pytest.mark.parametrize(
        ("arguments", "wanted"),
        [
            ({"config": {"train_batch_size": 1}}, "initialize\\(\\) needs a model"),
            ({"model": nn.Linear(1, 1)}, "pass config="),
            (
                {"model": nn.Linear(1, 1), "config": {"train_batch_size": 1}},
                "no optimizer: add a section such as",
            ),
            (
                {"model": nn.Linear(1, 1), "config": jobs.config(train_batch_size=15)},
                "multiple of 2, such as 14 or 16",
            ),
        ],
    )
    def test_mistakes(self, arguments: dict[str, Any], wanted: str) -> None:
        with pytest.raises(ValueError, match=wanted):
            ds_engine.initialize(**arguments)


class TestEngine:
    def test_unknown_attributes_are_the_modules(self) -> None:
        engine = jobs.engine()
        assert engine.embed is engine.module.embed
        assert sum(1 for _ in engine.parameters()) == 8
        with pytest.raises(AttributeError, match="neither the engine nor Net has an attribute 'nothing'"):
            _ = engine.nothing

    def test_modes(self) -> None:
        engine = jobs.engine()
        assert engine.eval() is engine and not engine.module.training
        assert engine.train() is engine and engine.module.training

    @pytest.mark.parametrize(
        ("loss", "wanted"),
        [
            (torch.ones(3, requires_grad=True), r"loss has shape \(3,\): reduce it to a single number"),
            (torch.ones(()), "loss does not require a gradient"),
        ],
    )
    def test_a_loss_that_cannot_be_trained_on(self, loss: Tensor, wanted: str) -> None:
        with pytest.raises(ValueError, match=wanted):
            jobs.engine().backward(loss)

    def test_destroy_twice_and_as_a_context(self) -> None:
        with jobs.engine(3) as engine:
            jobs.train(engine, 1)
        assert engine.module.embed.weight.isfinite().all()
        assert not engine.module._forward_pre_hooks
        engine.destroy()

    def test_two_engines_do_not_disturb_each_other(self) -> None:
        alone = jobs.train(jobs.engine(3), 4)
        first, second = jobs.engine(3), jobs.engine(1, seed=1)
        losses = []
        for step in range(4):
            losses += jobs.train(first, 1, first=step)
            jobs.train(second, 1, first=step)
        assert losses == alone

    def test_a_line_every_so_many_steps(self) -> None:
        engine = jobs.engine(steps_per_print=2)
        lines: list[str] = []
        engine.progress.write = lines.append
        jobs.train(engine, 5)
        assert [line.split(":")[0] for line in lines] == ["step 2", "step 4"]
        assert "gradient norm" in lines[0] and "64 samples" in lines[1]

    def test_no_lines_by_default(self, capfd: pytest.CaptureFixture[str]) -> None:
        jobs.train(jobs.engine(), 12)
        assert capfd.readouterr() == ("", "")


def test_world_is_a_value() -> None:
    assert isinstance(jobs.engine().world, ds_comm.World)


def test_activation_checkpointing_follows_the_configuration() -> None:
    section = {
        "contiguous_memory_optimization": True,
        "number_checkpoints": 2,
        "profile": True,
        "keep_outputs": ["matmuls"],
    }
    config = {"train_batch_size": 2, "startup_summary": False, "activation_checkpointing": section}
    config |= {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "zero_optimization": {"stage": 3}}
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    engine, *_ = ds_engine.initialize(model=layers, config=config)
    with engine:
        checkpointing = engine.activation_checkpointing()
        assert checkpointing.config.contiguous and checkpointing.config.num_checkpoints == 2
        assert checkpointing.config.keep_outputs == ("matmuls",)
        h = torch.ones(2, 4, requires_grad=True)
        for layer in layers:
            h = checkpointing(layer, h)
        engine.backward(h.mean())
        engine.step()
        assert checkpointing.statistics.recomputations == 2 and checkpointing.statistics.recompute_s > 0
    config["activation_checkpointing"] = {"partition_activations": True}
    engine, *_ = ds_engine.initialize(model=nn.Linear(2, 2), config=config)
    with engine, pytest.raises(ValueError, match="pass their process group"):
        engine.activation_checkpointing()
