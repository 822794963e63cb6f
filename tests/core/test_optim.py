"""The optimizers: torch's semantics, state formats and hooks; one pass over memory."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_core import arena, optim

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

PAIRS: dict[str, tuple[Make, Make]] = {
    "adamw": (
        lambda p: optim.FusedAdam(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    ),
    "adam": (
        lambda p: optim.FusedAdam(p, lr=1e-2, weight_decay=0.1, decoupled=False, maximize=True),
        lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, foreach=False, maximize=True),
    ),
    "adagrad": (
        lambda p: optim.FusedAdagrad(
            p, lr=0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.5
        ),
        lambda p: torch.optim.Adagrad(
            p, lr=0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.5, foreach=False
        ),
    ),
    "sgd": (
        lambda p: optim.FusedSGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1, foreach=False),
    ),
    "nesterov": (
        lambda p: optim.FusedSGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=False),
    ),
    "plain sgd": (
        lambda p: optim.FusedSGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    ),
}
pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())


def parameters() -> list[nn.Parameter]:
    shapes = [(7,), (33, 5), (0,), (4, 3, 2), (1,)]
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def give_grads(*lists: list[nn.Parameter], seed: int) -> None:
    for params in lists:
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)


def assert_close(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


@pairs
def test_agrees_with_torch(pair: tuple[Make, Make]) -> None:
    ours = parameters()
    theirs = copy.deepcopy(ours)
    fused, plain = pair[0](ours), pair[1](theirs)
    for step in range(10):
        give_grads(ours, theirs, seed=step)
        if step == 4:  # a parameter without gradient keeps its state and its own step
            ours[1].grad = theirs[1].grad = None
        fused.step()
        plain.step()
    assert_close(ours, theirs)


@pairs
def test_state_dicts_go_both_ways(pair: tuple[Make, Make]) -> None:
    ours = parameters()
    theirs = copy.deepcopy(ours)
    fused, plain = pair[0](ours), pair[1](theirs)
    for step in range(3):
        give_grads(ours, theirs, seed=step)
        fused.step()
        plain.step()
    swapped_fused, swapped_plain = pair[0](theirs), pair[1](ours)
    swapped_fused.load_state_dict(copy.deepcopy(plain.state_dict()))
    swapped_plain.load_state_dict(copy.deepcopy(fused.state_dict()))
    for step in range(3, 6):
        give_grads(ours, theirs, seed=step)
        swapped_fused.step()
        swapped_plain.step()
    assert_close(ours, theirs)


def every_optimizer() -> list[Make]:
    return [optim.FusedAdam, optim.FusedAdagrad, optim.FusedLion, optim.FusedLamb,
            lambda p: optim.FusedSGD(p, momentum=0.9)]  # fmt: skip


@pytest.mark.parametrize("make", every_optimizer())
def test_a_resumed_run_has_the_same_bits(make: Make) -> None:
    params = parameters()
    optimizer = make(params)
    give_grads(params, seed=0)
    optimizer.step()
    copied = copy.deepcopy(params)
    resumed = make(copied)
    resumed.load_state_dict(torch.load(_saved(optimizer.state_dict()), weights_only=True))
    for step in range(1, 4):
        give_grads(params, copied, seed=step)
        optimizer.step()
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(params, copied, strict=True))


def _saved(state: dict[str, Any]) -> Any:
    import io

    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return stream


@pytest.mark.parametrize("make", every_optimizer())
def test_step_fused_is_scale_step_and_copy(make: Make) -> None:
    params = parameters()
    plain = copy.deepcopy(params)
    fused, separate = make(params), make(plain)
    assert isinstance(fused, optim.FusedOptimizer)
    for step in range(3):
        give_grads(params, plain, seed=step)
        out: list[Tensor | None] = [torch.empty_like(p, dtype=torch.bfloat16) for p in params]
        out[0] = None
        for p in plain:
            assert p.grad is not None
            p.grad.mul_(0.25)
        fused.step_fused(params[:2], grad_scale=torch.tensor(0.25), out=out[:2])  # any subset, in any order
        fused.step_fused(params[:1:-1], grad_scale=torch.tensor(0.25), out=out[:1:-1])
        separate.step()
        for p, q, o in zip(params, plain, out, strict=True):
            assert torch.equal(p, q)
            assert o is None or torch.equal(o, p.to(torch.bfloat16))
    if "step" in fused.state[params[0]]:
        assert fused.state[params[0]]["step"].item() == 3.0


def test_step_fused_refuses_strangers() -> None:
    params = parameters()
    optimizer = optim.FusedAdam(params)
    with pytest.raises(ValueError, match=r"params\[0\] is in no parameter group"):
        optimizer.step_fused([torch.randn(3)], grad_scale=torch.tensor(1.0), out=[None])
    with pytest.raises(ValueError, match="out has 0 entries, but params has 1"):
        optimizer.step_fused(params[:1], grad_scale=torch.tensor(1.0), out=[])


def test_groups_and_schedulers() -> None:
    ours = parameters()
    theirs = copy.deepcopy(ours)
    runs = []
    for params, kind in ((ours, optim.FusedAdam), (theirs, torch.optim.AdamW)):
        optimizer = kind([{"params": params[:2], "lr": 1e-2}, {"params": params[2:], "weight_decay": 0.0}], lr=1e-3,
                         weight_decay=0.1)  # fmt: skip
        runs.append((optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)))
    for step in range(6):
        give_grads(ours, theirs, seed=step)
        for optimizer, scheduler in runs:
            optimizer.step()
            scheduler.step()
    assert_close(ours, theirs)


def test_closures_hooks_and_zero_grad() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = optim.FusedSGD([p], lr=0.5)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> float:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert calls == ["pre", "post"]
    assert torch.equal(p, torch.zeros(3))
    optimizer.zero_grad()
    assert p.grad is None


def test_channels_last_parameters() -> None:
    ours = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    fused = optim.FusedAdam(ours.parameters(), lr=1e-2)
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0, foreach=False)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(2, 3, 8, 8)
        for model, optimizer in ((ours, fused), (theirs, plain)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    ours.weight.grad = torch.ones(4, 3, 3, 3)  # another memory order than the parameter's
    theirs.weight.grad = torch.ones(4, 3, 3, 3)
    fused.step()
    plain.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)


def test_bf16_states_halve_the_memory_and_follow() -> None:
    ours = [nn.Parameter(torch.randn(1000))]
    theirs = copy.deepcopy(ours)
    half = optim.FusedAdam(ours, lr=1e-3, state_dtype=torch.bfloat16)
    full = optim.FusedAdam(theirs, lr=1e-3)
    for step in range(20):
        give_grads(ours, theirs, seed=step)
        half.step()
        full.step()
    assert half.state[ours[0]]["exp_avg"].dtype == torch.bfloat16
    assert (ours[0] - theirs[0]).abs().max() < 20 * 1e-3 * 0.05
    restored = optim.FusedAdam(copy.deepcopy(ours), state_dtype=torch.bfloat16)
    restored.load_state_dict(half.state_dict())
    (state,) = restored.state.values()
    assert torch.equal(state["exp_avg_sq"], half.state[ours[0]]["exp_avg_sq"])


def test_large_states_live_in_the_arena() -> None:
    before = arena.stats().in_use_bytes
    p = nn.Parameter(torch.randn(1024, 1024))
    small = nn.Parameter(torch.randn(10))
    optimizer = optim.FusedAdam([p, small])
    give_grads([p, small], seed=0)
    optimizer.step()
    assert arena.stats().in_use_bytes - before == 2 * 4 * 1024 * 1024
    assert optimizer.state[p]["exp_avg"].shape == p.shape


class Doubling(optim.FusedSGD):
    """Overrides `step`, as a user would."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        super().step(closure)
        return super().step(closure)


def test_hooks_run_once_whoever_overrides_step() -> None:
    for kind, moved in ((optim.FusedSGD, 0.5), (Doubling, 1.0)):
        p = nn.Parameter(torch.zeros(3))
        p.grad = torch.ones(3)
        optimizer = kind([p], lr=0.5)
        calls: list[str] = []
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("post"))
        optimizer.step()
        assert calls == ["pre", "post"]
        assert torch.equal(p, torch.full((3,), -moved))


def test_a_global_hook_and_a_profiler_are_served() -> None:
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = optim.FusedAdam([p])
    optimizer.step()  # light, nobody listens
    calls: list[object] = []
    handle = register_optimizer_step_pre_hook(lambda opt, *_: calls.append(opt))
    try:
        optimizer.step()
    finally:
        handle.remove()
    assert calls == [optimizer]
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#FusedAdam.step" in [event.key for event in profile.key_averages()]
    assert optimizer.state[p]["step"].item() == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.float64])
def test_counters_may_be_of_any_dtype_and_differ(dtype: torch.dtype) -> None:
    ours = parameters()
    theirs = copy.deepcopy(ours)
    fused = optim.FusedAdam(ours, lr=1e-2)
    plain = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0, foreach=False)
    give_grads(ours, theirs, seed=0)
    fused.step()
    plain.step()
    for number, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        if p.numel():
            fused.state[p]["step"] = torch.tensor(3 + number % 2, dtype=dtype)
            plain.state[q]["step"] = torch.tensor(3.0 + number % 2)
    versions = [fused.state[p]["step"]._version for p in ours if p.numel()]
    give_grads(ours, theirs, seed=1)
    fused.step()
    plain.step()
    assert_close(ours, theirs)
    assert [fused.state[p]["step"].item() for p in ours if p.numel()] == [4, 5, 5, 4]
    assert [fused.state[p]["step"]._version for p in ours if p.numel()] == [v + 1 for v in versions]


def test_a_refused_batch_leaves_the_counters() -> None:
    p, half = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = optim.FusedAdam([p, half])
    p.grad = torch.ones(3)
    optimizer.step()
    half.grad = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="must be float32"):
        optimizer.step()
    assert optimizer.state[half]["step"].item() == 0.0


def test_step_fused_follows_parameters_that_are_exchanged() -> None:
    old, new = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = optim.FusedSGD([old, nn.Parameter(torch.zeros(2))], lr=1.0)
    scale = torch.tensor(1.0)
    old.grad = new.grad = torch.ones(3)
    optimizer.step_fused([old], grad_scale=scale, out=[None])
    optimizer.param_groups[0]["params"][0] = new
    optimizer.step_fused([new], grad_scale=scale, out=[None])
    assert torch.equal(new, -torch.ones(3))
    with pytest.raises(ValueError, match=r"params\[0\] is in no parameter group"):
        optimizer.step_fused([old], grad_scale=scale, out=[None])


@pytest.mark.parametrize("decoupled", [True, False])
def test_without_bias_correction_moments_stay_as_they_are(decoupled: bool) -> None:
    """Against the formula, over steps, a copy and a resumed state of torch's."""
    params = parameters()
    optimizer = optim.FusedAdam(params, lr=1e-2, weight_decay=0.1, decoupled=decoupled, bias_correction=False)
    wanted = [p.detach().clone() for p in params]
    first, second = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for step in range(4):
        give_grads(params, seed=step)
        grads = [p.grad.clone() for p in params if p.grad is not None]
        for p, g, m, v in zip(wanted, grads, first, second, strict=True):
            g = g if decoupled else g + 0.1 * p
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            p.mul_(1 - 1e-3 if decoupled else 1).sub_(1e-2 * m / (v.sqrt() + 1e-8))
        optimizer.step()
        torch.testing.assert_close([p.detach() for p in params], wanted, rtol=1e-5, atol=1e-6)
        if step == 1:
            optimizer = copy.deepcopy(optimizer)
            params = optimizer.param_groups[0]["params"]
        if step == 2 and decoupled:
            theirs = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1).state_dict()
            optimizer.load_state_dict({**theirs, "state": optimizer.state_dict()["state"]})


def test_lamb_without_bias_correction_is_adam_s_uncorrected_direction_scaled_to_the_norm() -> None:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(33, 5))
    before = param.detach().clone()
    grad = torch.randn_like(before)
    param.grad = grad.clone()
    optim.FusedLamb([param], lr=0.1, eps=1e-8, bias_correction=False).step()
    direction = 0.1 * grad / ((0.001 * grad * grad).sqrt() + 1e-8)
    torch.testing.assert_close(
        param.detach(), before - 0.1 * before.norm() / direction.norm() * direction, rtol=1e-5, atol=1e-6
    )


def test_copies_and_pickles_keep_working() -> None:
    params = parameters()
    optimizer = optim.FusedAdam(params, state_dtype=torch.bfloat16)
    give_grads(params, seed=0)
    optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = twin.param_groups[0]["params"]
        give_grads(theirs, seed=1)
        twin.step()
    give_grads(params, seed=1)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, theirs, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: optim.FusedAdam(p, lr=-1.0), "lr must not be negative, but is -1.0"),
        (lambda p: optim.FusedAdam(p, betas=(1.0, 0.9)), r"betas must lie in \[0, 1\), but are \(1.0, 0.9\)"),
        (
            lambda p: optim.FusedAdam(p, state_dtype=torch.float16),
            "state_dtype must be torch.float32 or torch.bfl",
        ),
        (lambda p: optim.FusedSGD(p, nesterov=True), "nesterov needs momentum > 0"),
        (lambda p: optim.FusedLamb(p, min_ratio=2.0, max_ratio=1.0), "min_ratio must not exceed max_ratio"),
    ],
)
def test_options_are_checked(make: Make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(parameters())


def test_parameters_that_cannot_be_stepped_are_refused() -> None:
    half = nn.Parameter(torch.randn(4).bfloat16())
    half.grad = torch.randn(4).bfloat16()
    with pytest.raises(ValueError, match=r"params\[0\] must be float32, but is bfloat16"):
        optim.FusedAdam([half]).step()
    gaps = nn.Parameter(torch.randn(4, 4)[:, ::2])
    gaps.grad = torch.randn(4, 2)
    with pytest.raises(ValueError, match="without gaps in memory"):
        optim.FusedAdam([gaps]).step()
    table = nn.Embedding(4, 4, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradients; use sparse=False"):
        optim.FusedAdam(table.parameters()).step()
    plain = torch.optim.AdamW([half], amsgrad=True)
    with pytest.raises(ValueError, match="no amsgrad"):
        optim.FusedAdam([half]).load_state_dict(plain.state_dict())


NO_DYNAMO = """
import sys, torch
from ds_core import optim
p = torch.nn.Parameter(torch.randn(5))
for kind in (optim.FusedAdam, optim.FusedLion, optim.FusedLamb, optim.FusedAdagrad, optim.FusedSGD):
    o = kind([p])
    o.add_param_group({"params": [torch.nn.Parameter(torch.randn(3))]})
    p.grad = torch.randn(5)
    o.step()
    o.load_state_dict(o.state_dict())
    o.zero_grad()
assert "torch._dynamo" not in sys.modules
"""


def test_nothing_imports_dynamo() -> None:
    done = subprocess.run([sys.executable, "-c", NO_DYNAMO], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
