"""What `param.grad` is after a backward, and what that stops."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_core.optim
import ds_zero
from ds_zero.tensors.placeholder import ReducedGradient
from harness import ranks
from zero.models import Tiny, batch

STAGES = [0, 1, 2, 3]
SHARDED_ALL = ds_zero.ZeroConfig(persistence_threshold_numel=0)


def sharded(stage: int, config: ds_zero.ZeroConfig = SHARDED_ALL) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tiny()
    return ds_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), stage, config=config)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@pytest.fixture
def trained(request: pytest.FixtureRequest) -> nn.Module:
    """A model after one backward, with its optimizer kept alive."""
    model, request.node.optimizer = sharded(2)
    model(*batch(0, 0)).backward()
    return model


USES: dict[str, Callable[[nn.Parameter], object]] = {
    "norm": lambda p: p.grad.norm(),
    "add": lambda p: p + p.grad,
    "in place": lambda p: p.grad.mul_(2),
    "index": lambda p: p.grad[0],
    "iterate": lambda p: list(p.grad),
    "compare": lambda p: p.grad == 0,
    "convert": lambda p: p.grad.half(),
    "pointer": lambda p: p.grad.data_ptr(),
    "storage": lambda p: p.grad.untyped_storage(),
    "numpy": lambda p: p.grad.numpy(),
    "list": lambda p: p.grad.tolist(),
    "copy": lambda p: copy.deepcopy(p.grad),
    "save": lambda p: torch.save(p.grad, io.BytesIO()),
    "sparse": lambda p: p.grad.is_sparse,
    "reduce": lambda p: dist.all_reduce(p.grad) if dist.is_initialized() else p.grad.sum(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_every_use_of_a_reduced_gradient_raises_and_explains(
    trained: nn.Module, use: Callable[[nn.Parameter], object]
) -> None:
    with pytest.raises(ValueError, match=r"ds_zero\.clip_grad_norm_.*ds_zero\.get_full"):
        use(trained.head.weight)


def test_metadata_assignment_and_deletion_work(trained: nn.Module) -> None:
    param = trained.head.weight
    assert (param.grad.shape, param.grad.dtype, param.grad.device) == (param.shape, param.dtype, param.device)
    assert "no values" in repr(param.grad)
    param.grad = None
    assert param.grad is None
    del trained.embed.weight.grad
    trained.zero_grad(set_to_none=False)
    assert isinstance(trained.blocks[0].up.weight.grad, ReducedGradient)
    trained.to("cpu")
    trained.zero_grad()
    assert all(p.grad is None for p in trained.parameters())


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("foreach", [False, True])
def test_torchs_clipping_raises(stage: int, foreach: bool) -> None:
    model, _optimizer = sharded(stage)
    model(*batch(0, rank())).backward()
    with pytest.raises(ValueError, match=r"ds_zero\.clip_grad_norm_"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=foreach)
    with pytest.raises(ValueError, match=r"ds_zero\.clip_grad_norm_"):
        torch.nn.utils.clip_grad_value_(model.parameters(), 1.0, foreach=foreach)


LATE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": torch.optim.AdamW,
    "foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "rmsprop": torch.optim.RMSprop,
    "adafactor": torch.optim.Adafactor,
    "lbfgs": torch.optim.LBFGS,
    "ds_core": ds_core.optim.FusedAdam,
}


@pytest.mark.parametrize("make", LATE.values(), ids=LATE.keys())
@pytest.mark.parametrize("stage", STAGES)
def test_an_optimizer_over_the_parameters_raises_and_changes_nothing(
    stage: int, make: Callable[..., torch.optim.Optimizer]
) -> None:
    model, _optimizer = sharded(stage)
    before = {n: v.clone() for n, v in ds_zero.full_state_dict(model).items()}
    late = make(model.parameters())

    def closure() -> Tensor:
        loss: Tensor = model(*batch(0, 0))
        loss.backward()
        return loss

    if not isinstance(late, torch.optim.LBFGS):
        closure()
    with pytest.raises(ValueError, match=r"ds_zero\.shard_optimizer"):
        late.step(closure) if isinstance(late, torch.optim.LBFGS) else late.step()
    assert all(torch.equal(before[n], v) for n, v in ds_zero.full_state_dict(model).items())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_backward_that_nobody_announced_finds_handles_and_counts(stage: int, create_graph: bool) -> None:
    """Modules that are called by themselves have no output hook of the model, so handles are still there."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            x = torch.ones(2, 15, requires_grad=True)
            (model.blocks[0](x).square().mean() + model.blocks[1](x).mean()).backward(
                create_graph=create_graph
            )
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    plain = Tiny()
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    model, optimizer = sharded(stage)
    for _ in range(2):
        step(plain, plain_optimizer)
        step(model, optimizer)
    found = ds_zero.full_state_dict(model)
    assert all(torch.allclose(found[n], p, atol=1e-6) for n, p in plain.named_parameters())
    assert not torch.equal(found["blocks.0.up.weight"], sharded_start()["blocks.0.up.weight"])


def sharded_start() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(Tiny().state_dict())


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_parameters_show_nothing_where_that_is_wanted(stage: int) -> None:
    model, optimizer = sharded(stage)
    ds_zero.set_presentation(model, gradients="nothing")
    for _ in range(2):
        model(*batch(0, rank())).backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()


@ranks(2)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_reduced_gradients_are_shown_and_clipped_by_hand_at_stage_0(dtype: torch.dtype | None) -> None:
    results = []
    for by_hand in (True, False):
        config = ds_zero.ZeroConfig(param_dtype=dtype, accumulation_steps=1)
        model, optimizer = sharded(0, config)
        ds_zero.set_presentation(model, gradients="reduced" if by_hand else "handle")
        for step in range(3):
            model(*batch(step, rank())).backward()
            if by_hand:
                whole = ds_zero.get_full(model, "head.weight", "grad")
                assert torch.equal(model.head.weight.grad, whole)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                model.embed.weight.grad = model.embed.weight.grad * 2  # a replaced one counts, too
                model.blocks[0].norm.weight.grad = None
            else:
                norm = ds_zero.clip_grad_norm_(model, 0.1)
                doubled = ds_zero.get_full(model, "embed.weight", "grad") * 2
                ds_zero.set_full(model, "embed.weight", "grad", doubled)
                ds_zero.set_full(model, "blocks.0.norm.weight", "grad", torch.zeros(15))
            optimizer.step()
            optimizer.zero_grad()
            results.append((norm, ds_zero.full_state_dict(model)))
    for (norm, mine), (expected, others) in zip(results[:3], results[3:], strict=True):
        assert torch.allclose(norm, expected, rtol=1e-5)
        assert all(torch.allclose(mine[n], v, atol=1e-6) for n, v in others.items())


@ranks(2)
@pytest.mark.parametrize("plan", ["local", "sharded"])
def test_reduced_gradients_are_shown_only_where_they_are_complete(plan: str) -> None:
    config = ds_zero.ZeroConfig(accumulation_steps=2, accumulation=plan)
    model, optimizer = sharded(0, config)
    ds_zero.set_presentation(model, gradients="reduced")
    for step in range(4):
        model(*batch(step, rank())).backward()
        if step % 2 == 0:
            assert all(p.grad is None for p in model.parameters())
            continue
        whole = ds_zero.get_full(model, "head.weight", "grad")
        assert torch.equal(model.head.weight.grad, whole)
        model.head.weight.grad = whole * 0.5  # takes the place of what is shown
        assert ds_zero.foreign_gradients(model) == []
        optimizer.step()
        optimizer.zero_grad()
        model.head.weight.grad = torch.ones_like(model.head.weight)
        assert ds_zero.foreign_gradients(model) == [model.head.weight]
        model.head.weight.grad = None
