"""Loss scaling: when the scale changes, fp16 at every stage, and steps that are skipped on all ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_zero
from ds_core.optim import FusedAdam
from ds_zero.runtime.gradients.loss_scaler import ScaleState
from harness import ranks
from zero.models import Tiny, batch
from zero.parity import Job, Result, assert_same, plain, sharded

OPTIMIZERS = {"fused": FusedAdam, "adamw": torch.optim.AdamW}


# --- the counting

# Written from the rules, not from the code: (policy, "." finite or "x" not, the scale after each step).
TABLE = [
    ({"window": 3, "hysteresis": 1}, "......", [16, 16, 16, 32, 32, 32]),  # first doubling: step window + 1
    ({"window": 3, "hysteresis": 1}, ".......", [16, 16, 16, 32, 32, 32, 64]),
    (
        {"window": 3, "hysteresis": 1},
        "x....x..",
        [8, 8, 8, 8, 16, 8, 8, 8],
    ),  # and window + 1 after an overflow
    ({"window": 3, "hysteresis": 1}, "xxx", [8, 4, 2]),
    ({"window": 3, "hysteresis": 2}, "xxx", [16, 8, 4]),
    ({"window": 3, "hysteresis": 2}, "x.x.x", [16, 16, 8, 8, 4]),  # finite steps do not fill the count
    ({"window": 2, "hysteresis": 2}, "x...x.x", [16, 16, 16, 32, 32, 32, 16]),  # a doubling does
    ({"window": 9, "hysteresis": 2, "consecutive_hysteresis": True}, "x.x.xx", [16, 16, 16, 16, 16, 8]),
    ({"window": 9, "hysteresis": 3}, "xxxx", [16, 16, 8, 4]),
    ({"window": 9, "hysteresis": 1, "min_scale": 6.0}, "xx", [8, 6]),  # not below the minimum
    ({"window": 1, "hysteresis": 1}, "....", [16, 32, 64, 128]),
]


@pytest.mark.parametrize("options, steps, scales", TABLE)
def test_the_scale_moves_as_the_table_says(options: dict[str, Any], steps: str, scales: list[float]) -> None:
    state = ScaleState.of(ds_zero.DynamicScale(initial_scale=16.0, **options))
    found = []
    for step in steps:
        assert not (step == "x" and state.at_minimum)
        state.update(step == "x")
        found.append(state.scale)
    assert found == scales


def test_the_minimum_is_reached_only_when_the_count_is_used_up() -> None:
    state = ScaleState.of(ds_zero.DynamicScale(initial_scale=2.0, min_scale=1.0, hysteresis=2, window=9))
    state.update(True)
    state.update(True)
    assert (state.scale, state.at_minimum) == (1.0, True)
    fresh = ScaleState.of(ds_zero.DynamicScale(initial_scale=1.0, hysteresis=2))
    assert not fresh.at_minimum, "the first overflow only counts"
    fresh.update(True)
    assert fresh.at_minimum


def test_a_static_scale_never_moves() -> None:
    state = ScaleState.of(128.0)
    for overflow in (True, False, True, True):
        state.update(overflow)
    assert state.scale == 128.0 and not state.at_minimum


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ScaleState.of(0.0), r"scale=0\.0: it must be a positive finite number"),
        (lambda: ScaleState.of(math.inf), "scale=inf"),
        (lambda: ds_zero.DynamicScale(window=0), "window=0: it must be at least 1"),
        (lambda: ds_zero.DynamicScale(hysteresis=0), "hysteresis=0"),
        (
            lambda: ds_zero.DynamicScale(initial_scale=1.0, min_scale=2.0),
            r"initial_scale=1\.0, min_scale=2\.0",
        ),
    ],
)
def test_impossible_policies_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- training


def adamw(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def fused(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return FusedAdam(params, lr=1e-2, weight_decay=0.1)


@ranks(2)
@pytest.mark.parametrize("make, clip", [(fused, 0.3), (fused, None), (adamw, 0.3), (adamw, None)])
def test_a_scale_changes_nothing_in_fp32(make: Any, clip: float | None) -> None:
    """A power of two costs no bit, clipped or not, in one multiply or in two: equal to a plain loop without it."""
    job = Job(steps=3, accumulation=2, clip=clip, optimizer=make, model={"extras": True})
    scaled = Job(**{**vars(job), "scale": 1024.0})
    expected = plain(job, "sharded")
    for stage in (0, 2, 3):
        found = sharded(scaled, stage, accumulation="sharded")
        assert_same(Result(found.losses, found.norms if clip else [], found.weights), expected)


@ranks(2)
@pytest.mark.parametrize("plan", ["local", "sharded"])
@pytest.mark.parametrize("make", [fused, adamw])
def test_stages_agree_bitwise_in_fp16(plan: str, make: Any) -> None:
    """The initial scale is too large for this model, so that some steps are skipped."""
    policy = ds_zero.DynamicScale(initial_scale=2.0**24, window=2, hysteresis=1)
    job = Job(
        steps=12,
        accumulation=2,
        clip=0.3,
        dtype=torch.float16,
        scale=policy,
        model={"extras": True},
        optimizer=make,
    )
    first = sharded(job, 0, accumulation=plan)
    assert sum(not math.isfinite(n) for n in first.norms) >= 2, "some steps must have been skipped"
    assert sum(math.isfinite(n) for n in first.norms) >= 5, "and others not"
    for stage in (1, 2, 3):
        found = sharded(job, stage, accumulation=plan)
        assert_same(nan_safe(found), nan_safe(first))
    exact = sharded(Job(steps=12, accumulation=2, clip=0.3, model={"extras": True}, optimizer=make), 0)
    assert first.losses[0] == pytest.approx(exact.losses[0], rel=1e-2)
    assert first.losses[0] != exact.losses[0], "it must really compute in fp16"
    assert first.losses[-1] < first.losses[0]


def nan_safe(result: Result) -> Result:
    return Result(result.losses, [n if math.isfinite(n) else -1.0 for n in result.norms], result.weights)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    shards = [s for g in optimizer.param_groups for s in g["params"]]
    states = [v for s in shards for v in optimizer.state.get(s, {}).values() if isinstance(v, Tensor)]
    whole = [p for p in model.parameters() if p.untyped_storage().nbytes() > 4]
    return [t.detach().clone() for t in [*shards, *states, *whole, *model.buffers()]]


@ranks(2)
@pytest.mark.parametrize("kind", ["fused", "adamw"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_infinity_on_one_rank_leaves_the_step_out_on_all(stage: int, kind: str) -> None:
    torch.manual_seed(0)
    model = Tiny(extras=True)
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ds_zero.shard(model, optimizer, stage, config=ds_zero.ZeroConfig(param_dtype=torch.bfloat16))
    scaler = ds_zero.LossScaler(model, ds_zero.DynamicScale(hysteresis=1))
    for step in range(4):
        before = snapshot(model, optimizer) if step == 2 else []
        loss = model(*batch(step, dist.get_rank()))
        if step == 2 and dist.get_rank() == 1:
            loss = loss * math.inf
        scaler.scale(loss).backward()
        if step == 2:
            assert not math.isfinite(ds_zero.clip_grad_norm_(model, 1.0))
        optimizer.step()
        norm = ds_zero.grad_norm(model)
        assert norm is not None and norm.finite == (step != 2) == (not scaler.step_was_skipped)
        if step == 2:
            assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=True))
            assert all(s.grad is None for g in optimizer.param_groups for s in g["params"])
        optimizer.zero_grad()
        assert scaler.loss_scale == (65536.0 if step < 2 else 32768.0)
    assert scaler.skipped_steps == 1
    assert scaler.culprit is not None and "'head.weight' (and " in scaler.culprit


@ranks(2)
def test_a_skipped_step_forgets_what_it_used() -> None:
    """A parameter that only the skipped step used has no gradient afterwards: weight decay must not move it."""
    for skip_by_hand in (True, False):
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        ds_zero.shard(model, optimizer, 2)
        if not skip_by_hand:
            ds_zero.LossScaler(model, 1.0)
        x = torch.ones(1, 4)
        before = ds_zero.full_state_dict(model)
        (model["b"](x).sum() * math.inf).backward()
        if skip_by_hand:
            assert not math.isfinite(ds_zero.clip_grad_norm_(model, 1.0))
        else:
            optimizer.step()
        optimizer.zero_grad()
        model["a"](x).sum().backward()
        optimizer.step()
        after = ds_zero.full_state_dict(model)
        for name in after:
            assert torch.equal(after[name], before[name]) == name.startswith("b"), name


@ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_at_the_minimum_the_error_names_the_parameter_and_advises_bf16(stage: int) -> None:
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, stage)
    policy = ds_zero.DynamicScale(initial_scale=2.0, min_scale=1.0, hysteresis=1)
    scaler = ds_zero.LossScaler(model, policy)
    for _ in range(1):
        scaler.scale(_broken(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert scaler.loss_scale == 1.0
    before = snapshot(model, optimizer)
    scaler.scale(_broken(model)).backward()
    wanted = re.escape("parameter 'blocks.1.down.bias' (and ") + ".*train in bf16"
    with pytest.raises(ds_zero.LossScaleError, match=wanted):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=True))


def _broken(model: Tiny) -> Tensor:
    """On rank 1 the gradient of the second block's output is infinite: all parameters from there on back."""
    rank = dist.get_rank()

    def spoil(module: nn.Module, args: object, output: Tensor) -> None:
        output.register_hook(lambda g: g * math.inf if rank == 1 else g)

    handle = model.blocks[1].register_forward_hook(spoil)
    loss: Tensor = model(*batch(0, rank))
    handle.remove()
    return loss


@ranks(2)
def test_norms_before_and_after_are_those_of_true_gradients() -> None:
    for kind in OPTIMIZERS:
        found = []
        for scale in (None, 1.0, 4096.0):
            torch.manual_seed(0)
            model = Tiny()
            optimizer = OPTIMIZERS[kind](model.parameters(), lr=1e-2)
            ds_zero.shard(model, optimizer, 2)
            assert ds_zero.grad_norm(model) is None
            scaler = None if scale is None else ds_zero.LossScaler(model, scale)
            loss = model(*batch(0, dist.get_rank()))
            (loss if scaler is None else scaler.scale(loss)).backward()
            first = ds_zero.clip_grad_norm_(model, 0.5)
            second = ds_zero.clip_grad_norm_(model, 0.25)  # sees what the first one left
            norm = ds_zero.grad_norm(model)
            assert norm is not None
            assert norm.before == first.item() > 0.5
            assert second.item() == pytest.approx(0.5, rel=1e-5)
            assert norm.after == pytest.approx(0.25, rel=1e-5)
            optimizer.step()
            assert ds_zero.grad_norm(model) == norm, "kept after the step"
            found.append((norm, ds_zero.full_state_dict(model)))
        for norm, weights in found[1:]:
            assert norm == found[0][0]
            assert all(torch.equal(weights[n], found[0][1][n]) for n in weights)


@ranks(2)
def test_a_scaler_measures_the_norm_of_a_step_that_is_not_clipped() -> None:
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, 3)
    scaler = ds_zero.LossScaler(model)
    scaler.scale(model(*batch(0, dist.get_rank()))).backward()
    optimizer.step()
    norm = ds_zero.grad_norm(model)
    assert norm is not None and 0 < norm.before == norm.after < 100


@ranks(2)
def test_a_loss_that_was_not_scaled_is_noticed() -> None:
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, 1)
    ds_zero.LossScaler(model)
    model(*batch(0, dist.get_rank())).backward()
    with pytest.raises(ValueError, match=r"was not scaled.*call scaler\.scale\(loss\)\.backward\(\)"):
        optimizer.step()


def test_a_second_scaler_and_a_scaler_without_model_are_refused() -> None:
    model = Tiny()
    with pytest.raises(ValueError, match="this Tiny is not sharded"):
        ds_zero.LossScaler(model)
    ds_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    scaler = ds_zero.LossScaler(model)
    with pytest.raises(ValueError, match="has a LossScaler already"):
        ds_zero.LossScaler(model)
    ds_zero.destroy(model)
    with pytest.raises(ValueError, match="not sharded any more"):
        scaler.scale(torch.ones(()))


def test_an_fp16_loss_does_not_overflow_when_it_is_scaled() -> None:
    model = Tiny()
    ds_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    scaler = ds_zero.LossScaler(model, 2.0**14)
    scaled = scaler.scale(torch.tensor(6.0, dtype=torch.float16))
    assert scaled.dtype == torch.float32 and scaled.item() == 6.0 * 2**14


@ranks(2)
def test_the_state_goes_on_as_if_nothing_had_happened() -> None:
    policy = ds_zero.DynamicScale(initial_scale=16.0, window=3, hysteresis=2)
    overflows = [False, True, False, True, False, False, False, False, True, False]

    def run(steps: range, saved: dict[str, Any] | None) -> tuple[list[float], dict[str, Any]]:
        torch.manual_seed(0)
        model = Tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        ds_zero.shard(model, optimizer, 2)
        scaler = ds_zero.LossScaler(model, policy)
        if saved is not None:
            scaler.load_state_dict(saved)
        scales = []
        for step in steps:
            loss = model(*batch(step, dist.get_rank()))
            scaler.scale(loss * math.inf if overflows[step] else loss).backward()
            with pytest.raises(ValueError, match="between backward and step"):
                scaler.load_state_dict(scaler.state_dict())
            optimizer.step()
            optimizer.zero_grad()
            scales.append(scaler.loss_scale)
        return scales, scaler.state_dict()

    whole, end = run(range(10), None)
    for cut in (2, 4, 7):
        first, saved = run(range(cut), None)
        second, last = run(range(cut, 10), saved)
        assert first + second == whole and last == end


# --- clipping and what comes after


@ranks(2)
@pytest.mark.parametrize("scale", [None, 256.0])
@pytest.mark.parametrize("kind", ["fused", "adamw"])
@pytest.mark.parametrize("plan", ["local", "sharded"])
def test_a_backward_after_clipping_adds_to_the_clipped_gradient(
    plan: str, kind: str, scale: float | None
) -> None:
    """As in plain PyTorch: clip, another backward, step."""
    torch.manual_seed(0)
    plain_model, model = Tiny(), Tiny()
    model.load_state_dict(plain_model.state_dict())
    plain_optimizer = torch.optim.SGD(plain_model.parameters(), lr=0.1)
    optimizer: torch.optim.Optimizer
    if kind == "fused":
        from ds_core.optim import FusedSGD

        optimizer = FusedSGD(model.parameters(), lr=0.1)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, 2, config=ds_zero.ZeroConfig(accumulation=plan))
    scaler = None if scale is None else ds_zero.LossScaler(model, scale)
    for step in range(2):
        loss = model(*batch(step, 0))
        (loss if scaler is None else scaler.scale(loss)).backward()
        plain_model(*batch(step, 0)).backward()
        if step == 0:
            norm = ds_zero.clip_grad_norm_(model, 0.1)
            assert torch.nn.utils.clip_grad_norm_(plain_model.parameters(), 0.1).item() == pytest.approx(
                norm.item()
            )
    optimizer.step()
    plain_optimizer.step()
    weights = ds_zero.full_state_dict(model)
    for name, value in weights.items():
        torch.testing.assert_close(value, plain_model.state_dict()[name], rtol=1e-5, atol=1e-6)
