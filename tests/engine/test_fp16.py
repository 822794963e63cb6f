"""The engine in fp16, bf16 with its options, and under torch.autocast."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import ds_engine
import ds_zero
from ds_zero import LossScaleError
from engine import jobs
from harness import ranks

STAGES = [0, 1, 2, 3]
# The first scale is too large for the net of `jobs`, the next ones are not.
FP16: dict[str, Any] = {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 4, "hysteresis": 1}


def train_with_overflow(engine: ds_engine.Engine, steps: int, first: int = 0, at: int = -1) -> list[float]:
    """As `jobs.train`; in step `at` rank 1's first micro-batch has an infinite loss."""
    losses = []
    for k, (tokens, wanted) in enumerate(
        jobs.micro_batches(engine, first + steps)[first * engine.batch.steps :]
    ):
        loss = jobs.loss_of(engine, tokens, wanted)
        losses.append(loss.item())
        bad = engine.world.rank == 1 and first * engine.batch.steps + k == at * engine.batch.steps
        engine.backward(loss * math.inf if bad else loss)
        engine.step()
    return losses


@ranks(2)
def test_fp16_trains_alike_at_every_stage() -> None:
    found = []
    for stage in STAGES:
        engine = jobs.engine(stage, fp16=FP16)
        losses = train_with_overflow(engine, 12)
        found.append(
            (losses, engine.skipped_steps, engine.loss_scale, ds_zero.full_state_dict(engine.module))
        )
        assert engine.module.embed.weight.dtype == torch.float16
        assert engine.global_steps == 12 and engine.skipped_steps >= 2
        assert engine.loss_scale != 2.0**20 and all(math.isfinite(loss) for loss in losses)
        engine.destroy()
    # The plans of stages 0, 1 and 2, 3 add micro-batches in another order; they differ in the last bits.
    for one, other in ((0, 1), (2, 3)):
        assert found[one][:3] == found[other][:3]
        assert all(torch.equal(v, found[other][3][n]) for n, v in found[one][3].items())


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_on_one_rank_is_a_step_that_did_not_happen(stage: int) -> None:
    engine = jobs.engine(
        stage, fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1}, steps_per_print=1
    )
    lines: list[str] = []
    engine.progress.write = lines.append
    train_with_overflow(engine, 2)
    assert engine.was_step_applied() and engine.loss_scale == 256.0
    before = {n: v.clone() for n, v in ds_zero.full_state_dict(engine.module).items()}
    rate, samples = engine.get_lr(), engine.global_samples
    train_with_overflow(engine, 1, first=2, at=2)
    assert not engine.was_step_applied()
    assert (engine.global_steps, engine.skipped_steps, engine.loss_scale) == (3, 1, 128.0)
    assert engine.global_samples == samples + 16 and engine.get_lr() == rate
    after = ds_zero.full_state_dict(engine.module)
    assert all(torch.equal(before[n], after[n]) for n in before if n != "seen")
    assert all(s.grad is None for g in engine.optimizer.param_groups for s in g["params"])
    assert not math.isfinite(engine.get_global_grad_norm() or 0.0)
    train_with_overflow(engine, 1, first=3)
    assert engine.was_step_applied() and engine.get_lr() != rate
    if engine.world.rank == 0:
        assert "skipped on all ranks" in lines[2] and "loss scale 256 -> 128" in lines[2]
        assert "parameter 'embed.weight' (and " in lines[2] or "parameter 'inner." in lines[2]
        assert "loss scale 128, " in lines[-1]


def test_norms_are_of_true_gradients() -> None:
    clip = {"gradient_clipping": 0.01}
    plain = jobs.engine(1, **clip)
    scaled = jobs.engine(
        1, **clip, torch_autocast={"enabled": True, "dtype": "fp16"}, fp16={"loss_scale": 64}
    )
    assert scaled.loss_scale == 64.0
    for engine in (plain, scaled):
        jobs.train(engine, 1)
    a, b = plain.get_global_grad_norm(), scaled.get_global_grad_norm()
    assert a is not None and b is not None
    assert b == pytest.approx(a, rel=0.02)
    assert scaled.get_global_grad_norm(clipped=True) == pytest.approx(0.01, rel=1e-4)


@ranks(2)
def test_scale_and_backward_are_the_same() -> None:
    found = []
    for by_hand in (False, True):
        engine = jobs.engine(2, fp16={"enabled": True, "loss_scale": 32})
        for tokens, wanted in jobs.micro_batches(engine, 2):
            loss = jobs.loss_of(engine, tokens, wanted)
            if by_hand:
                engine.scale(loss).backward()
            else:
                assert engine.backward(loss).item() == loss.item() / 2, "returned without the loss scale"
            engine.step()
        found.append(ds_zero.full_state_dict(engine.module))
    assert all(torch.equal(v, found[1][n]) for n, v in found[0].items())


@ranks(2)
def test_a_loss_that_was_not_scaled_is_refused() -> None:
    engine = jobs.engine(1, fp16=FP16, gradient_accumulation_steps=1)
    (tokens, wanted), *_ = jobs.micro_batches(engine, 1)
    jobs.loss_of(engine, tokens, wanted).backward()
    with pytest.raises(RuntimeError, match=r"there was no engine\.backward\(loss\) before it"):
        engine.step()


@ranks(2)
def test_at_the_minimum_training_ends_with_a_name_and_an_advice() -> None:
    engine = jobs.engine(2, fp16={"enabled": True, "initial_scale_power": 1, "hysteresis": 1})
    train_with_overflow(engine, 1, at=0)
    assert engine.loss_scale == 1.0
    with pytest.raises(LossScaleError, match=r"its minimum.*parameter '.*train in bf16"):
        train_with_overflow(engine, 1, first=1, at=1)


@ranks(2)
def test_at_the_minimum_stage_0_goes_on() -> None:
    engine = jobs.engine(0, fp16={"enabled": True, "initial_scale_power": 1, "hysteresis": 1})
    train_with_overflow(engine, 1, at=0)
    with pytest.warns(UserWarning, match=r"its minimum.*parameter '.*are skipped"):
        train_with_overflow(engine, 2, first=1, at=1)
    train_with_overflow(engine, 1, first=3, at=3)  # said once
    assert engine.loss_scale == 1.0
    assert engine.skipped_steps == 3


@ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_checkpoint_goes_on_with_the_scale_bit_by_bit(stage: int, tmp_path: Path) -> None:
    box = [str(tmp_path)]
    dist.broadcast_object_list(box, src=0)
    whole = jobs.engine(stage, fp16=FP16)
    losses = train_with_overflow(whole, 10)
    for cut in (1, 6):  # while the scale comes down; and between two doublings
        first = jobs.engine(stage, fp16=FP16)
        begun = train_with_overflow(first, cut)
        first.save_checkpoint(box[0], tag=f"at{cut}")
        second = jobs.engine(stage, seed=1, fp16=FP16)
        second.load_checkpoint(box[0], tag=f"at{cut}")
        assert (second.loss_scale, second.skipped_steps) == (first.loss_scale, first.skipped_steps)
        assert begun + train_with_overflow(second, 10 - cut, first=cut) == losses
        assert second.loss_scale == whole.loss_scale and second.skipped_steps == whole.skipped_steps
    other = jobs.engine(stage)
    other.load_checkpoint(box[0], tag="at6")
    assert other.loss_scale == 1.0, "in fp32 there is no scale to take over"
    other.save_checkpoint(box[0], tag="fp32")
    fresh = jobs.engine(stage, fp16=FP16)
    fresh.load_checkpoint(box[0], tag="fp32")
    assert fresh.loss_scale == 2.0**20, "nor to give"


def test_bf16_without_the_check_takes_every_step() -> None:
    engine = jobs.engine(0, bf16={"enabled": True, "check_grad_overflow": False}, gradient_clipping=0)
    (tokens, wanted), *_ = jobs.micro_batches(engine, 1)
    for _ in range(2):
        engine.backward(jobs.loss_of(engine, tokens, wanted) * math.inf)
        engine.step()
    assert engine.was_step_applied() and engine.skipped_steps == 0
    assert not torch.isfinite(ds_zero.full_state_dict(engine.module)["head.weight"]).all()


@ranks(2)
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_bf16_states_take_half_the_memory(offload: str) -> None:
    sizes, losses = {}, {}
    for states in (False, True):
        engine = jobs.engine(
            0,
            bf16={"enabled": True, "bf16_optimizer_states": states},
            zero_optimization={"stage": 1, "offload_optimizer": {"device": offload}},
        )
        losses[states] = jobs.train(engine, 5)
        held = [
            v for s in engine.optimizer.state.values() for v in s.values() if isinstance(v, Tensor) and v.ndim
        ]
        assert {v.dtype for v in held} == {torch.bfloat16 if states else torch.float32}
        sizes[states] = sum(v.nbytes for v in held)
    assert sizes[True] * 2 == sizes[False] > 0
    assert losses[True] != losses[False]
    torch.testing.assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]), rtol=0.05, atol=0.05)


def test_bf16_states_need_an_optimizer_of_ours() -> None:
    with pytest.raises(ds_engine.ConfigError, match="torch's RMSprop keeps its states in the dtype"):
        jobs.engine(0, bf16={"enabled": True, "bf16_optimizer_states": True}, optimizer={"type": "RMSprop"})


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("plan", ["local", "sharded"])
def test_gradients_are_summed_in_the_dtype_asked_for(stage: int, plan: str) -> None:
    zero = {"stage": stage, "accumulation_plan": plan}
    found = {}
    for dtype in ("fp32", "bf16"):
        engine = jobs.engine(
            stage, bf16={"enabled": True}, data_types={"grad_accum_dtype": dtype}, zero_optimization=zero
        )
        found[dtype] = jobs.train(engine, 5), ds_zero.memory(engine.module, engine.optimizer).grads_bytes
    assert found["fp32"][1] == 2 * found["bf16"][1] > 0
    assert found["fp32"][0][:2] == found["bf16"][0][:2] and found["fp32"][0] != found["bf16"][0]
    torch.testing.assert_close(
        torch.tensor(found["fp32"][0]), torch.tensor(found["bf16"][0]), rtol=0.05, atol=0.05
    )


# --- autocast


class Mixed(nn.Module):
    """An embedding, a normalisation and linear layers: autocast computes the last in bf16 and the others in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen = [x.dtype for x in (self.embed(tokens), self.up(self.embed(tokens)))]
        return self.head(self.norm(functional.gelu(self.up(self.embed(tokens)))))


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed()


def plain_autocast(steps: int) -> list[float]:
    """What anyone would write: whole fp32 model, autocast around forward, gradients averaged over ranks."""
    model, rank = mixed(), dist.get_rank()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    losses = []
    for step in range(steps):
        tokens, wanted = data(step, rank)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(tokens)
        loss = functional.cross_entropy(out.float(), wanted)
        loss.backward()
        for p in model.parameters():
            assert p.grad is not None
            parts = [torch.empty_like(p.grad) for _ in range(2)]
            dist.all_gather(parts, p.grad)
            p.grad = (parts[0] + parts[1]) / 2
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def data(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    tokens = torch.randint(0, 11, (2, 6), generator=generator)
    return tokens[0], tokens[1]


AUTOCAST: list[tuple[dict[str, Any], set[str]]] = [
    ({}, {"up.weight", "up.bias", "head.weight", "head.bias"}),
    ({"lower_precision_safe_modules": []}, set()),
    (
        {"dtype": "bf16", "lower_precision_safe_modules": ["torch.nn.Linear"]},
        {"up.weight", "up.bias", "head.weight", "head.bias"},
    ),
]


@ranks(2)
@pytest.mark.parametrize("stage, row", [(0, 0), (1, 1), (2, 2), (2, 0), (3, 0), (3, 1)])
def test_autocast_equals_a_plain_loop_bit_by_bit(stage: int, row: int) -> None:
    section, low = AUTOCAST[row]
    model = mixed()
    engine, *_ = ds_engine.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
        config={
            "train_batch_size": 12,
            "gradient_clipping": 0,
            "torch_autocast": {"enabled": True, **section},
            "zero_optimization": {"stage": stage}
            | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
            "startup_summary": False,
        },
    )
    assert {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16} == low
    losses = []
    for step in range(4):
        tokens, wanted = data(step, dist.get_rank())
        loss = functional.cross_entropy(engine(tokens).float(), wanted)
        assert model.seen == [torch.float32, torch.bfloat16]
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses == plain_autocast(4)


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_autocast_of_the_users_own_around_a_sharded_model(stage: int) -> None:
    model = mixed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    ds_zero.shard(model, optimizer, stage, config=ds_zero.ZeroConfig(persistence_threshold_numel=0))
    losses = []
    for step in range(4):
        tokens, wanted = data(step, dist.get_rank())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(tokens)
        loss = functional.cross_entropy(out.float(), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == plain_autocast(4)
