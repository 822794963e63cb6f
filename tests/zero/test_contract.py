"""The contract of `shard`, point by point (docs/design/ds-zero.md)."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_zero
from harness import ranks
from zero.models import Tiny, batch

STAGES = [0, 1, 2, 3]


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_objects_names_and_shapes_stay(stage: int) -> None:
    model = Tiny()
    optimizer = adamw(model)
    params = dict(model.named_parameters())
    shapes = {n: p.shape for n, p in params.items()}
    groups = list(optimizer.param_groups)
    lengths = [len(g["params"]) for g in groups]
    found_model, found_optimizer = ds_zero.shard(model, optimizer, stage)
    assert found_model is model
    assert found_optimizer is optimizer
    assert all(dict(model.named_parameters())[n] is p for n, p in params.items())
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
    assert [len(g["params"]) for g in groups] == lengths
    for group in groups:
        for shard in group["params"]:
            assert shard.ndim == 1
            assert shard.dtype == torch.float32
            assert shard.requires_grad


@ranks(2)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("stage", STAGES)
def test_shards_together_are_the_parameter(stage: int, dtype: torch.dtype | None) -> None:
    model = Tiny()
    original = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters())
    ds_zero.shard(model, optimizer, stage, config=ds_zero.ZeroConfig(param_dtype=dtype))
    for (name, value), shard in zip(original.items(), optimizer.param_groups[0]["params"], strict=True):
        box: list[torch.Tensor | None] = [None, None]
        dist.all_gather_object(box, shard.detach())
        parts = [t for t in box if t is not None]
        whole = parts[0] if stage == 0 else torch.cat(parts)
        assert torch.equal(whole, value.flatten()), name


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_masters_of_a_group_are_one_contiguous_partition_cut_at_cache_lines(stage: int) -> None:
    model = Tiny()
    optimizer = adamw(model)
    ds_zero.shard(
        model,
        optimizer,
        stage,
        config=ds_zero.ZeroConfig(param_dtype=torch.bfloat16, reduce_bucket_numel=500),
    )
    for group in optimizer.param_groups:
        shards = [s for s in group["params"] if s.numel()]
        assert len({s.untyped_storage().data_ptr() for s in shards}) == 1
        base = shards[0].untyped_storage().data_ptr()
        assert all((s.data_ptr() - base) % 64 == 0 for s in shards)


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_fp32_shards_are_views_of_the_parameters_own_storage(stage: int) -> None:
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    ds_zero.shard(model, optimizer, stage)
    memory = ds_zero.memory(model, optimizer)
    assert memory.masters_bytes == 0
    for param, shard in zip(model.parameters(), optimizer.param_groups[0]["params"], strict=True):
        if stage < 3 and shard.numel():
            assert shard.untyped_storage().data_ptr() == param.untyped_storage().data_ptr()


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_rank_0_wins(stage: int) -> None:
    torch.manual_seed(dist.get_rank())
    model = Tiny(extras=True)
    model.offset.fill_(float(dist.get_rank()))
    torch.manual_seed(0)
    expected = Tiny(extras=True)
    ds_zero.shard(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), stage)
    found = ds_zero.full_state_dict(model)
    if dist.get_rank() == 0:
        assert all(torch.equal(found[n], p) for n, p in expected.named_parameters())
    assert torch.equal(model.offset, torch.zeros(15))


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_existing_optimizer_state_is_cut_along(stage: int) -> None:
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(*batch(0, 0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    twin, twin_optimizer = _copy(model, optimizer)
    ds_zero.shard(model, optimizer, stage)
    for step in range(1, 4):
        model(*batch(step, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        twin(*batch(step, 0)).backward()
        twin_optimizer.step()
        twin_optimizer.zero_grad()
    found = ds_zero.full_state_dict(model)
    if dist.get_rank() == 0:
        assert all(torch.equal(found[n], p) for n, p in twin.named_parameters())


def _copy(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin, twin_optimizer


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_schedulers_and_state_dict_indices_go_on_working(stage: int) -> None:
    model = Tiny()
    optimizer = adamw(model)
    ds_zero.shard(model, optimizer, stage)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    model(*batch(0, dist.get_rank())).backward()
    optimizer.step()
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [5e-3, 5e-3]
    saved = optimizer.state_dict()
    assert [i for g in saved["param_groups"] for i in g["params"]] == list(
        range(len(list(model.parameters())))
    )
    optimizer.load_state_dict(saved)


@ranks(2)
@pytest.mark.parametrize("accumulation", ["local", "sharded"])
@pytest.mark.parametrize("stage", STAGES)
def test_none_starts_a_new_accumulation_and_zeros_go_on(stage: int, accumulation: str) -> None:
    grads = []
    for set_to_none in (True, False):
        torch.manual_seed(0)
        model = Tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        ds_zero.shard(model, optimizer, stage, config=ds_zero.ZeroConfig(accumulation=accumulation))  # type: ignore[arg-type]
        for step in range(2):
            model(*batch(step, dist.get_rank())).backward()
            ds_zero.clip_grad_norm_(model, 0)
            grads.append([s.grad.clone() for s in optimizer.param_groups[0]["params"] if s.numel()])
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    assert all(torch.equal(a, b) for a, b in zip(grads[0], grads[2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads[1], grads[3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(grads[0], grads[1], strict=True))


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_forgetting_to_clear_gradients_is_said(stage: int) -> None:
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, stage)
    model(*batch(0, 0)).backward()
    optimizer.step()
    model.zero_grad()
    with pytest.warns(UserWarning, match=r"optimizer\.zero_grad"):
        model(*batch(1, 0)).backward()


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_no_sync_defers_reduction(stage: int) -> None:
    results = []
    for plan in ("local", "sharded"):
        torch.manual_seed(0)
        model = Tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ds_zero.shard(model, optimizer, stage, config=ds_zero.ZeroConfig(accumulation=plan))  # type: ignore[arg-type]
        with ds_zero.no_sync(model):
            for step in range(2):
                model(*batch(step, dist.get_rank())).backward()
            # Nothing is reduced; one entry shows that something waits, so that zero_grad() can drop it.
            shown = [s.grad for s in optimizer.param_groups[0]["params"] if s.grad is not None]
            assert len(shown) == 1 and bool(shown[0].isnan().all())
        model(*batch(2, dist.get_rank())).backward()
        optimizer.step()
        results.append(ds_zero.full_state_dict(model))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


@ranks(2)
def test_readers_see_new_parameters_when_step_returns() -> None:
    for stage in (0, 1, 2):
        torch.manual_seed(0)
        model = Tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = model.head.weight.detach().clone()
        ds_zero.shard(model, optimizer, stage)
        model(*batch(0, dist.get_rank())).backward()
        optimizer.step()
        after = [torch.empty_like(before) for _ in range(2)]
        dist.all_gather(after, model.head.weight.detach())
        assert torch.equal(after[0], after[1])
        assert not torch.equal(after[0], before)


@ranks(2)
def test_a_sharded_parameter_reads_as_nan_and_refuses_writes() -> None:
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, 3, config=ds_zero.ZeroConfig(persistence_threshold_numel=0))
    weight = model.head.weight
    assert weight.shape == (37, 15)
    assert weight.isnan().all()
    with torch.no_grad(), pytest.raises(RuntimeError, match="single memory location"):
        weight.add_(1)
    with torch.no_grad():
        weight.fill_(1.0)  # torch lets this one through: it is found when the module runs
    with pytest.raises(ValueError, match=r"'head\.weight' was written while it is sharded"):
        model(*batch(0, 0))


@ranks(2)
def test_a_step_with_closure_is_refused() -> None:
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, 1)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


@ranks(2)
def test_a_later_add_param_group_is_refused_at_the_next_step() -> None:
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, 1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(ValueError, match="shard again"):
        optimizer.step()


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_destroy_leaves_nothing_behind(stage: int) -> None:
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    ds_zero.shard(model, optimizer, stage)
    model(*batch(0, dist.get_rank())).backward()
    optimizer.step()
    ds_zero.destroy(model)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    model(*batch(1, 0)).backward()
    optimizer.step()
    ds_zero.shard(model, optimizer, stage)  # and again


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_outlives_the_model(stage: int) -> None:
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    ds_zero.shard(model, optimizer, stage)
    model(*batch(0, dist.get_rank())).backward()
    optimizer.step()
    pointers = [weakref.ref(model), weakref.ref(optimizer), *(weakref.ref(p) for p in model.parameters())]
    del model, optimizer
    gc.collect()
    assert [p() for p in pointers] == [None] * len(pointers)


@ranks(2)
def test_two_models_in_one_process_do_not_meet() -> None:
    torch.manual_seed(0)
    models = [Tiny(), Tiny(dim=11)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    for stage, (model, optimizer) in zip((3, 1), zip(models, optimizers, strict=True), strict=True):
        ds_zero.shard(model, optimizer, stage)
    for step in range(2):
        for model in models:
            model(*batch(step, dist.get_rank())).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert ds_zero.describe(models[0]).stage == 3
    assert ds_zero.describe(models[1]).stage == 1


@ranks(2)
@pytest.mark.parametrize("plan", ["local", "sharded"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_backward_that_raises_is_noticed_and_undone(stage: int, plan: str) -> None:
    """All ranks fail alike, as when a batch is skipped after an error; training goes on as if it had not been."""
    results = []
    for fails in (False, True):
        torch.manual_seed(0)
        model = Tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        config = ds_zero.ZeroConfig(accumulation=plan, persistence_threshold_numel=0)  # type: ignore[arg-type]
        ds_zero.shard(model, optimizer, stage, config=config)
        for step in range(3):
            if fails and step == 1:
                with pytest.raises(ZeroDivisionError):
                    _failing_loss(model, batch(9, dist.get_rank())).backward()
                with pytest.warns(UserWarning, match="previous backward did not finish"):
                    loss = model(*batch(step, dist.get_rank()))
            else:
                loss = model(*batch(step, dist.get_rank()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(ds_zero.full_state_dict(model))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def _failing_loss(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    handle = model.blocks[0].register_forward_hook(lambda *a: a[2].register_hook(fail) and None)  # type: ignore[operator,index,union-attr]
    loss: torch.Tensor = model(*data)
    handle.remove()
    return loss


@ranks(1, 2)
def test_torchs_grad_scaler_is_refused() -> None:
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, 2)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(*batch(0, 0))).backward()
    with pytest.raises(ValueError, match=r"torch\.amp\.GradScaler.*ds_zero\.LossScaler\(model\)"):
        scaler.step(optimizer)


def test_double_precision_is_refused() -> None:
    model = Tiny().double()
    with pytest.raises(ValueError, match=r"'embed\.weight' has dtype torch\.float64, but masters are fp32"):
        ds_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
