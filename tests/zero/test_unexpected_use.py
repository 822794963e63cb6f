"""What users do that nobody planned for: training stays that of plain PyTorch, or an error says why not."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import ds_offload
import ds_zero
from ds_zero.comm.collectives import TorchAllGather
from ds_zero.comm.direct import OrderedReduceScatter
from harness import ranks


class Outside(nn.Module):
    """Reads a child's weight in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.mid = nn.Linear(16, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.linear(self.mid(self.embed(tokens)), self.embed.weight)


class Transposed(Outside):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.mid(self.embed(tokens)) @ self.embed.weight.T


class Bare(nn.Module):
    """No forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)


class Holders(nn.Module):
    """Parameters in modules that are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(16, 16) / 4) for _ in range(2)])
        self.bare = Bare()
        self.head = nn.Linear(16, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for weight in self.listed:
            h = torch.tanh(h @ weight)
        return self.head(h @ self.bare.weight)


@dataclasses.dataclass
class Output:
    hidden: Tensor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Output:
        return Output(self.down(torch.tanh(self.up(x))))


class Dataclasses(nn.Module):
    """Blocks whose output pytree does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(16, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for block in self.blocks:
            h = h + block(h).hidden
        return self.head(h)


def _tokens(step: int) -> Tensor:
    return torch.randint(0, 40, (3, 5), generator=torch.Generator().manual_seed(step))


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten().roll(1))


def _pair(
    model: nn.Module, optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
    twin = copy.deepcopy(model)
    return twin, optimizer(twin.parameters()), optimizer(model.parameters())


def _sgd(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


@ranks(2)
@pytest.mark.parametrize("make", [Outside, Transposed, Holders, Dataclasses])
def test_stage_3_trains_models_whose_parameters_are_read_in_odd_ways(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    twin, twin_optimizer, optimizer = _pair(model, _sgd)
    ds_zero.shard(model, optimizer, 3, config=ds_zero.ZeroConfig(persistence_threshold_numel=0))
    for step in range(3):
        with torch.no_grad():
            assert torch.allclose(_loss(model.eval(), _tokens(9)), _loss(twin.eval(), _tokens(9)), atol=1e-6)
        model.train()
        for which, opt in ((model, optimizer), (twin, twin_optimizer)):
            _loss(which, _tokens(step)).backward()
            opt.step()
            opt.zero_grad()
    assert ds_zero.memory(model, optimizer).gathered_bytes == 0
    found = ds_zero.full_state_dict(model)
    if dist.get_rank() == 0:
        assert all(torch.allclose(found[n], p, atol=1e-6) for n, p in twin.named_parameters())


class Branches(nn.Module):
    """Each rank uses other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.ways[dist.get_rank()](x)
        return found


@ranks(2)
def test_ranks_that_use_other_parameters_send_the_same_dtype() -> None:
    """bf16, local plan: a bucket that a rank has not used in the first micro-batch still goes out in fp32."""
    model = Branches()
    optimizer = _sgd(model.parameters())
    config = ds_zero.ZeroConfig(
        accumulation="local", accumulation_steps=2, reduce_bucket_numel=280, param_dtype=torch.bfloat16
    )
    ds_zero.shard(model, optimizer, 1, config=config)
    x = torch.ones(2, 16, dtype=torch.bfloat16)
    for _ in range(2):
        model(x).float().sum().backward()
    optimizer.step()
    grads = [s.grad for s in optimizer.param_groups[0]["params"] if s.numel() and s.grad is not None]
    assert all(torch.equal(g, torch.full_like(g, 2.0)) for g in grads)
    assert grads


@ranks(2)
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_parameters_that_are_frozen_and_trained_in_turns(stage: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[0].requires_grad_(False)
    twin, twin_optimizer, optimizer = _pair(model, _sgd)
    ds_zero.shard(model, optimizer, stage, config=ds_zero.ZeroConfig(persistence_threshold_numel=0))
    for step in range(4):
        for which, opt in ((model, optimizer), (twin, twin_optimizer)):
            which[0].requires_grad_(step > 0)
            which[2].requires_grad_(step != 2)
            which(torch.ones(2, 16) * step).pow(2).sum().backward()
            opt.step()
            opt.zero_grad()
    found = ds_zero.full_state_dict(model)
    if dist.get_rank() == 0:
        assert all(torch.allclose(found[n], p, atol=1e-6) for n, p in twin.named_parameters())


@ranks(2)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, ds_offload.CPUAdam])
def test_clipping_twice_keeps_the_first_clip(kind: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    optimizer = kind(model.parameters())
    ds_zero.shard(model, optimizer, 1)
    (model(torch.ones(4, 16)) * 3).pow(2).sum().backward()
    assert ds_zero.clip_grad_norm_(model, 0.5) > 1
    assert abs(ds_zero.clip_grad_norm_(model, float("inf")).item() - 0.5) < 1e-5
    assert abs(ds_zero.clip_grad_norm_(model, 0.25).item() - 0.5) < 1e-5
    assert abs(ds_zero.clip_grad_norm_(model, 0).item() - 0.25) < 1e-5


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(16, 16), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


@ranks(2)
@pytest.mark.parametrize("name", ["Adagrad", "AdamW", "ASGD", "NAdam"])
@pytest.mark.parametrize("stage", [0, 1])
def test_states_of_a_0_dim_parameter_are_cut_along(stage: int, name: str) -> None:
    torch.manual_seed(0)
    model = Scalar()
    twin, twin_optimizer, optimizer = _pair(model, lambda params: getattr(torch.optim, name)(params, lr=0.01))
    for step in range(3):
        if step == 1:
            ds_zero.shard(model, optimizer, stage)
        for which, opt in ((model, optimizer), (twin, twin_optimizer)):
            which(torch.ones(2, 16) + step).pow(2).sum().backward()
            opt.step()
            opt.zero_grad()
    found = ds_zero.full_state_dict(model)
    if dist.get_rank() == 0:
        assert all(torch.allclose(found[n], p, atol=1e-6) for n, p in twin.named_parameters())


@ranks(2)
def test_torchs_state_dicts_of_a_sharded_model() -> None:
    values = nn.Linear(16, 16).state_dict()
    for stage, dtype in ((1, torch.bfloat16), (3, None)):
        model = nn.Linear(16, 16)
        config = ds_zero.ZeroConfig(param_dtype=dtype, persistence_threshold_numel=0)
        ds_zero.shard(model, _sgd(model.parameters()), stage, config=config)
        with pytest.raises(ValueError, match=r"load_state_dict on a sharded model.*before ds_zero\.shard"):
            model.load_state_dict(values)
    with pytest.raises(ValueError, match=r"NaN.*ds_zero\.full_state_dict"):
        model.state_dict()
    ds_zero.full_state_dict(model)  # says nothing


@ranks(2)
def test_a_copy_of_a_stage_3_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    config = ds_zero.ZeroConfig(persistence_threshold_numel=0)
    ds_zero.shard(model, _sgd(model.parameters()), 3, config=config)
    with pytest.raises(ValueError, match=r"copy of a module that was sharded.*full_state_dict"):
        copy.deepcopy(model)(torch.ones(2, 16))


@ranks(2)
@pytest.mark.parametrize("stage, dtype", [(1, torch.bfloat16), (3, None)])
def test_a_part_of_a_model_cannot_be_loaded_behind_its_masters(stage: int, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 16)), nn.Linear(16, 16))
    copied = copy.deepcopy(model)
    values = {k: v + 1 for k, v in model[0].state_dict().items()}
    config = ds_zero.ZeroConfig(param_dtype=dtype, persistence_threshold_numel=0)
    ds_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), stage, config=config)
    for part, found in ((model[0], values), (model[0][0], {k[2:]: v for k, v in values.items()})):
        with pytest.raises(ValueError, match=r"load_state_dict on a sharded model.*before ds_zero\.shard"):
            part.load_state_dict(found)
    if stage == 3:
        with pytest.raises(
            ValueError, match=r"would contain NaN.*ds_zero\.full_state_dict.*ds_zero\.gathered"
        ):
            model[0].state_dict()
    # A copy of stages 0 to 2 is an ordinary module; and inside a context that writes, loading is writing.
    copied[0].load_state_dict(values)
    with ds_zero.gathered(model[0], write=True):
        model[0].load_state_dict(values)
    found = ds_zero.full_state_dict(model)
    if dist.get_rank() == 0:
        wanted = {k: v if dtype is None else v.to(dtype).float() for k, v in values.items()}
        assert all(torch.equal(found[f"0.{k}"], v) for k, v in wanted.items())
    with pytest.raises(ValueError, match=r"assign=True\) would replace parameters"):
        model.load_state_dict(values, assign=True, strict=False)


class _Slow:
    """An all-gather whose messages arrive only when they are waited for."""

    def __init__(self, inner: Callable[..., object]) -> None:
        self.inner, self.pending = inner, 0

    def __call__(
        self, output: Tensor, input: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> object:
        self.pending += 1
        arrived = output.clone()
        self.inner(arrived, input.clone(), group)
        slow = self

        class Work:
            def wait(self) -> None:
                slow.pending -= 1
                output.copy_(arrived)

        return Work()


@ranks(2)
@pytest.mark.parametrize("way", ["model", "part", "state_dict", "part's state_dict", "load", "full", "clip"])
def test_whoever_reads_waits_for_published_parameters(way: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 16)), nn.Linear(16, 16))
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = _sgd(model.parameters()), _sgd(twin.parameters())
    slow = _Slow(TorchAllGather())
    ds_zero.shard(
        model,
        optimizer,
        1,
        config=ds_zero.ZeroConfig(overlap_publish=True),
        comm=ds_zero.Comm(slow, OrderedReduceScatter()),
    )
    x = torch.ones(2, 16)
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        m(x).sum().backward()
        o.step()
        o.zero_grad()
    assert slow.pending > 0, "step must not wait"
    if way == "model":
        assert torch.equal(model(x), twin(x))
    elif way == "part":
        assert torch.equal(model[0][0](x), twin[0][0](x))
    elif way == "state_dict":
        assert all(torch.equal(v, twin.state_dict()[k]) for k, v in model.state_dict().items())
    elif way == "part's state_dict":
        assert all(torch.equal(v, twin[0].state_dict()[k]) for k, v in model[0].state_dict().items())
    elif way == "load":
        zeros = {k: torch.zeros_like(v) for k, v in twin[0].state_dict().items()}
        model[0].load_state_dict(zeros)
        assert not model[0][0].weight.any()
    elif way == "full":
        found = ds_zero.full_state_dict(model)
        assert all(torch.equal(v, twin.state_dict()[k]) for k, v in found.items())
    else:  # reads no parameter: nothing to wait for
        ds_zero.clip_grad_norm_(model, 1.0)
        assert slow.pending > 0
        model(x)
    assert slow.pending == 0
