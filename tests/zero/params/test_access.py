"""Parameters, gradients and optimizer states by name, against plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import ds_zero
from ds_offload import CPUAdam, HostStore
from harness import ranks
from zero.models import Tiny, batch

STAGES = [0, 1, 2, 3]
DTYPES = [None, torch.bfloat16]


def make(
    stage: int, dtype: torch.dtype | None = None, host: bool = False, **config: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tiny(extras=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = CPUAdam(trained, lr=1e-2, weight_decay=0.01) if host else torch.optim.AdamW(trained, lr=1e-2)
    options = ds_zero.ZeroConfig(param_dtype=dtype, **config)
    return ds_zero.shard(model, optimizer, stage, config=options, store=HostStore() if host else None)


def reference() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tiny(extras=True)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def plain_backward(model: nn.Module, step: int) -> None:
    """Gradients of the mean over ranks, computed by every rank for itself; exact for one and two ranks."""
    for r in range(size()):
        (model(*batch(step, r)) / size()).backward()


@ranks(1, 2, 3)
@pytest.mark.parametrize(("stage", "host"), [(0, True), (1, False), (2, True), (3, False)])
def test_what_is_read_is_what_plain_pytorch_has(stage: int, host: bool) -> None:
    model, optimizer = make(stage, host=host)
    plain, plain_optimizer = reference()
    for step in range(2):
        model(*batch(step, rank())).backward()
        plain_backward(plain, step)
        for name, p in plain.named_parameters():
            check(ds_zero.get_full(model, name, "grad"), p.grad)
        optimizer.step()
        optimizer.zero_grad()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    for name, p in plain.named_parameters():
        check(ds_zero.get_full(model, name), p.detach())
        assert ds_zero.get_full(model, name, "grad") is None
        held = plain_optimizer.state.get(p, {})
        for kind in ("exp_avg", "exp_avg_sq"):
            check(ds_zero.get_full(model, model.get_parameter(name), kind), held.get(kind))
    if not host:
        steps = ds_zero.get_full(None, model.get_parameter("head.weight"), "step")
        assert steps is not None and steps.item() == 2


def check(found: Tensor | None, expected: Tensor | None) -> None:
    if expected is None:
        assert found is None
        return
    assert found is not None and found.shape == expected.shape and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@ranks(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_written_parameter_is_seen_by_forward_and_kept_by_the_step(
    stage: int, dtype: torch.dtype | None
) -> None:
    model, optimizer = make(stage, dtype)
    plain, _ = reference()
    fine = torch.linspace(-0.3, 0.3, 37 * 15).view(37, 15)  # more digits than bf16 has
    # Only rank 0's value counts.
    ds_zero.set_full(model, "head.weight", "param", fine if rank() == 0 else None)
    frozen = plain.get_parameter("frozen.weight").detach() * 2
    ds_zero.set_full(model, "frozen.weight", "param", frozen)
    with torch.no_grad():
        plain.get_parameter("head.weight").copy_(fine)
        plain.get_parameter("frozen.weight").copy_(frozen)
    found = ds_zero.get_full(model, "head.weight")
    assert found is not None and torch.equal(found, fine), "the master has every digit"
    data = batch(0, rank())
    if dtype is not None:
        plain.to(dtype)
    loss = model(*data)
    assert loss.item() == pytest.approx(plain(*data).item(), rel=0.02 if dtype else 1e-6)
    loss.backward()
    optimizer.step()
    after = ds_zero.get_full(model, "head.weight")
    assert after is not None and 0 < (after - fine).abs().max() < 0.021


@ranks(2)
@pytest.mark.parametrize(("host", "clip"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("stage", STAGES)
def test_a_written_gradient_is_what_is_stepped_with(stage: int, host: bool, clip: bool) -> None:
    model, optimizer = make(stage, host=host)
    plain, plain_optimizer = reference()
    model(*batch(0, rank())).backward()
    plain_backward(plain, 0)
    if clip:
        norm = ds_zero.clip_grad_norm_(model, 0.1)
        factor = torch.clamp(0.1 / (norm + 1e-6), max=1.0)
        for p in plain.parameters():
            if p.grad is not None:
                p.grad.mul_(factor)
    check(ds_zero.get_full(model, "embed.weight", "grad"), plain.get_parameter("embed.weight").grad)
    written = torch.linspace(-1, 1, 37 * 15).view(37, 15)
    for name in ("head.weight", "unused.weight"):  # the second one has no gradient of its own
        shape = plain.get_parameter(name).shape
        value = written.reshape(-1)[: shape.numel()].view(shape)
        ds_zero.set_full(model, name, "grad", value)
        plain.get_parameter(name).grad = value.clone()
    optimizer.step()
    plain_optimizer.step()
    for name, p in plain.named_parameters():
        check(ds_zero.get_full(model, name), p.detach())


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_written_states_are_used(stage: int) -> None:
    model, optimizer = make(stage)
    plain, plain_optimizer = reference()
    with pytest.raises(ValueError, match=r"no state 'exp_avg' for 'head\.weight'.*first step"):
        ds_zero.set_full(model, "head.weight", "exp_avg", torch.zeros(37, 15))
    for step in range(2):
        model(*batch(step, rank())).backward()
        plain_backward(plain, step)
        optimizer.step()
        plain_optimizer.step()
        optimizer.zero_grad()
        plain_optimizer.zero_grad()
        if step == 0:
            value = torch.linspace(0, 1, 37 * 15).view(37, 15)
            ds_zero.set_full(model, "head.weight", "exp_avg", value)
            ds_zero.set_full(model, "head.weight", "step", 7)
            held = plain_optimizer.state[plain.get_parameter("head.weight")]
            held["exp_avg"].copy_(value)
            held["step"].fill_(7)
    found = ds_zero.get_full(model, "head.weight", "step")
    assert found is not None and found.item() == 8
    for name, p in plain.named_parameters():
        check(ds_zero.get_full(model, name), p.detach())


@ranks(1, 3)
@pytest.mark.parametrize(("stage", "dtype"), [(0, None), (1, torch.bfloat16), (2, None), (3, torch.bfloat16)])
def test_local_parts_make_the_whole(stage: int, dtype: torch.dtype | None) -> None:
    model, optimizer = make(stage, dtype)
    model(*batch(0, rank())).backward()
    ds_zero.clip_grad_norm_(model, 1.0)
    for kind in ("grad", "param", "exp_avg"):
        if kind == "exp_avg":
            optimizer.step()
        for name in ("embed.weight", "head.weight", "blocks.1.up.bias", "scale"):
            whole = ds_zero.get_full(model, name, kind)
            own = ds_zero.get_local(model, name, kind)
            start, numel = ds_zero.local_range(model, name)
            assert whole is not None
            if numel:
                assert own is not None
                assert torch.equal(own, whole.reshape(-1)[start : start + numel])
            else:
                assert own is None or own.numel() == 0
            count = torch.tensor([numel])
            if size() > 1:
                dist.all_reduce(count)
            assert count.item() == whole.numel() * (size() if stage == 0 else 1)


@ranks(2)
@pytest.mark.parametrize("kind", ["param", "grad", "exp_avg_sq"])
@pytest.mark.parametrize(("stage", "dtype"), [(0, torch.bfloat16), (1, None), (2, torch.bfloat16), (3, None)])
def test_written_local_parts_are_seen_by_all(stage: int, dtype: torch.dtype | None, kind: str) -> None:
    model, optimizer = make(stage, dtype)
    model(*batch(0, rank())).backward()
    optimizer.step()
    optimizer.zero_grad()
    name = "embed.weight"
    start, numel = ds_zero.local_range(model, name)
    expected = torch.linspace(0.1, 0.9, 37 * 15)
    ds_zero.set_local(model, name, kind, expected[start : start + numel])
    found = ds_zero.get_full(model, name, kind)
    assert found is not None and torch.equal(found.reshape(-1), expected)
    if kind == "param":
        with ds_zero.gathered(model.get_parameter(name)):
            shown = model.get_parameter(name).detach().reshape(-1)
            assert torch.equal(shown, expected.to(shown.dtype))
    with pytest.raises(ValueError, match=r"owns .* elements from .* but the value has"):
        ds_zero.set_local(model, name, kind, torch.zeros(numel + 1))


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_updated_many_at_a_time(stage: int) -> None:
    model, optimizer = make(stage)
    plain, plain_optimizer = reference()
    model(*batch(0, rank())).backward()
    plain_backward(plain, 0)
    seen: list[torch.Size] = []

    def halve(grad: Tensor, param: nn.Parameter) -> Tensor:
        seen.append(grad.shape)
        assert grad.shape == param.shape
        return grad / 2

    ds_zero.update_full_grads(model, model.parameters(), halve)
    for p in plain.parameters():
        if p.grad is not None:
            p.grad.mul_(0.5)
    assert len(seen) == sum(p.grad is not None for p in plain.parameters())
    optimizer.step()
    plain_optimizer.step()
    for name, p in plain.named_parameters():
        check(ds_zero.get_full(model, name), p.detach())


@ranks(3)
@pytest.mark.parametrize("plan", ["local", "sharded"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_looking_changes_nothing(stage: int, plan: str) -> None:
    """Also in the middle of an accumulation, [Note: reading gradients has no effect]; and it shows the sum so far."""
    results = []
    for look in (False, True):
        model, optimizer = make(stage, accumulation=plan)
        plain, _ = reference()
        for step in range(2):
            plain.zero_grad()
            for micro in range(3):
                model(*batch(3 * step + micro, rank())).backward()
                if look:
                    if step == 0:
                        plain_backward(plain, micro)
                    for name, p in plain.named_parameters():
                        found = ds_zero.get_full(model, name, "grad")
                        ds_zero.get_local(model, name, "grad")
                        if step == 0:
                            check(found, p.grad)
            ds_zero.clip_grad_norm_(model, 0.5)
            optimizer.step()
            optimizer.zero_grad()
        results.append([ds_zero.get_full(model, name) for name, _ in plain.named_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # type: ignore[arg-type]


@ranks(2)
@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_true_ones_whatever_the_loss_scale(stage: int, host: bool) -> None:
    model, optimizer = make(stage, host=host)
    scaler = ds_zero.LossScaler(model, 1024.0)
    plain, plain_optimizer = reference()
    scaler.scale(model(*batch(0, rank()))).backward()
    plain_backward(plain, 0)
    check(ds_zero.get_full(model, "embed.weight", "grad"), plain.get_parameter("embed.weight").grad)
    value = torch.linspace(-1, 1, 37 * 15).view(37, 15)
    ds_zero.set_full(model, "head.weight", "grad", value)
    plain.get_parameter("head.weight").grad = value.clone()
    found = ds_zero.get_local(model, "head.weight", "grad")
    start, numel = ds_zero.local_range(model, "head.weight")
    assert found is not None and torch.equal(found, value.reshape(-1)[start : start + numel])
    optimizer.step()
    plain_optimizer.step()
    for name, p in plain.named_parameters():
        check(ds_zero.get_full(model, name), p.detach())


@ranks(4, groups_may_stay=True)
@pytest.mark.parametrize("stage", STAGES)
def test_replicated_groups(stage: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ds_zero.shard(model, optimizer, stage, mesh)
    plain = Tiny()
    torch.manual_seed(0)
    plain = Tiny()
    model(*batch(0, rank())).backward()
    plain_backward(plain, 0)
    for name, p in plain.named_parameters():
        check(ds_zero.get_full(model, name, "grad"), p.grad)
    fine = torch.linspace(-0.3, 0.3, 37 * 15).view(37, 15)
    ds_zero.set_full(model, "head.weight", "param", fine + rank())
    with ds_zero.gathered(model.head.weight):
        assert torch.equal(model.head.weight, fine)
    with ds_zero.gathered(model, write=True, writer_rank=1):
        model.embed.weight.data.fill_(rank())
    found = ds_zero.get_full(model, "embed.weight")
    assert found is not None and found.unique().tolist() == [1.0]


@ranks(2)
def test_mistakes_are_named() -> None:
    model, _ = make(3)
    with pytest.raises(ValueError, match="no parameter 'nothing'"):
        ds_zero.get_full(model, "nothing")
    with pytest.raises(ValueError, match=r"a name .* needs the model"):
        ds_zero.get_full(None, "head.weight")
    with pytest.raises(ValueError, match=r"'frozen\.weight' is frozen"):
        ds_zero.set_full(model, "frozen.weight", "grad", torch.zeros(15, 15))
    with pytest.raises(ValueError, match=r"has shape \(37, 15\) but the value has shape \(2,\)"):
        ds_zero.set_full(model, "head.weight", "param", torch.zeros(2))
    assert ds_zero.get_full(model, "frozen.weight", "grad") is None
    assert ds_zero.get_full(model, "frozen.weight", "exp_avg") is None
    with pytest.raises(ValueError, match="not sharded"):
        ds_zero.get_full(None, nn.Parameter(torch.zeros(1)))


@ranks(2)
def test_tied_parameters_answer_to_every_name() -> None:
    torch.manual_seed(0)
    model = Tiny(tied=True)
    expected = model.embed.weight.detach().clone()
    ds_zero.shard(model, torch.optim.AdamW(model.parameters()), 3)
    for name in ("embed.weight", "head.weight"):
        found = ds_zero.get_full(model, name)
        assert found is not None and torch.equal(found, expected)
