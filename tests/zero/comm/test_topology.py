"""Meshes of one and two axes, secondary copies, model parallelism, experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ds_zero
from ds_core.optim import FusedLamb, Muon, muon_groups
from ds_zero import _registry
from ds_zero.comm.collectives import Comm, default_comm
from ds_zero.comm.direct import OrderedReduceScatter
from ds_zero.interfaces import Work
from harness import ranks
from zero.models import Tiny, batch
from zero.params.test_records import Memory, everyones

STAGES = [0, 1, 2, 3]
CPU = torch.device("cpu")


def adamw(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, who: int | None = None, micro: int = 1
) -> list[float]:
    who = dist.get_rank() if who is None else who
    norms = []
    for step in steps:
        for k in range(micro):
            (model(*batch(step * micro + k, who)) / micro).backward()
        norms.append(ds_zero.clip_grad_norm_(model, 0.3).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All values on every rank."""
    with ds_zero.gathered(list(model.parameters())):
        return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a | b)


def tiny(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Tiny(**options)


def run(
    stage: int, steps: int = 4, *, mesh: Any = None, **config: Any
) -> tuple[dict[str, Tensor], list[float]]:
    model = tiny(tied=True)
    optimizer = adamw(model.parameters())
    options = ds_zero.ZeroConfig(reduce_bucket_numel=700, accumulation="sharded", **config)
    ds_zero.shard(model, optimizer, stage, mesh, config=options)
    norms = train(model, optimizer, range(steps), micro=2)
    return whole(model), norms


# --- meshes


@ranks(4, groups_may_stay=True)
@pytest.mark.parametrize("stage", STAGES)
def test_replicas_of_sharded_groups_equal_one_group(stage: int) -> None:
    """HSDP, MiCS: two rows of two ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    found, norms = run(stage, mesh=mesh)
    expected, expected_norms = run(stage)
    assert same(found, expected)
    assert norms == expected_norms


@ranks(4, groups_may_stay=True)
def test_replicas_hold_and_send_what_they_should() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    comm = default_comm(CPU)
    model = tiny(dim=48)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, 2, mesh, comm=comm)
    numel = sum(p.numel() for p in model.parameters())
    assert ds_zero.describe(model).owned_numel == pytest.approx(numel / 2, rel=0.03)
    assert ds_zero.describe(model).num_ranks == 4
    train(model, optimizer, range(1))
    # Inside a row half of everything, across rows half of a half and back.
    assert comm.reduced_bytes == pytest.approx(4 * numel * (1 / 2 + 1 / 4), rel=0.03)
    assert comm.gathered_bytes == pytest.approx(4 * numel * (1 / 4 + 1 / 2), rel=0.03)


@ranks(4, groups_may_stay=True)
def test_replicas_are_saved_once_and_resume_flat() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    model = tiny(extras=True)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(params)
    ds_zero.shard(model, optimizer, 3, mesh)
    train(model, optimizer, range(2))
    saved = Memory(everyones(ds_zero.records(model, optimizer)))
    assert all((count == 1).all() for count in saved.seen.values())
    train(model, optimizer, range(2, 4))
    other = tiny(extras=True)
    again = adamw([p for p in other.parameters() if p.requires_grad])
    ds_zero.shard(other, again, 2)
    ds_zero.load_records(other, again, saved)
    train(other, again, range(2, 4))
    assert same(whole(model), whole(other))


@ranks(4, groups_may_stay=True)
def test_rank_0_of_all_replicas_wins() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(dist.get_rank())
    model = Tiny()
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    ds_zero.shard(model, adamw(model.parameters()), 3, mesh)
    found = whole(model)
    box = [expected]
    dist.broadcast_object_list(box, src=0)
    assert same(found, box[0])


@ranks(4, groups_may_stay=True)
@pytest.mark.parametrize("shape, axis", [((2, 2), "data"), ((1, 2, 2), "data"), ((2, 1, 2), "tensor")])
def test_one_axis_of_a_mesh(shape: tuple[int, ...], axis: str) -> None:
    """Rows of other axes train on their own; each equals two ranks alone."""
    names = ("pipe", "data", "tensor")[-len(shape) :]
    names = ("data", "tensor") if len(shape) == 2 else names
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)[axis]
    model = tiny()
    optimizer = adamw(model.parameters())
    ds_zero.shard(model, optimizer, 2, mesh)
    train(model, optimizer, range(3), who=mesh.get_local_rank())
    alone = tiny()
    reference = adamw(alone.parameters())
    for step in range(3):
        parts = [torch.autograd.grad(alone(*batch(step, r)), list(alone.parameters())) for r in range(2)]
        total = [(a + b) / 2 for a, b in zip(*parts, strict=True)]
        factor = torch.clamp(0.3 / (ds_zero.total_norm(total) + 1e-6), max=1.0)
        for param, grad in zip(alone.parameters(), total, strict=True):
            param.grad = grad * factor
        reference.step()
    assert same(whole(model), {n: p.detach() for n, p in alone.named_parameters()})


@ranks(2)
def test_a_process_group_serves_as_well() -> None:
    found, _ = run(2, mesh=dist.group.WORLD)
    assert same(found, run(2)[0])


@ranks(4, groups_may_stay=True)
def test_meshes_that_do_not_fit_are_refused() -> None:
    model = tiny()
    half = DeviceMesh("cpu", [0, 1])
    if dist.get_rank() > 1:
        with pytest.raises(ValueError, match="this process is not in the mesh"):
            ds_zero.shard(model, adamw(model.parameters()), 1, half)
    with pytest.raises(ValueError, match="mesh has 3 axes"):
        ds_zero.shard(model, adamw(model.parameters()), 1, init_device_mesh("cpu", (2, 2, 1)))


# --- secondary copies


class Gathers:
    """Writes down how many ranks each gather asked."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._inner = default_comm(CPU).all_gather

    def __call__(self, output: Tensor, input: Tensor, group: Any, async_op: bool = False) -> Work | None:
        self.sizes.append(group.size())
        return self._inner(output, input, group, async_op)


@ranks(4)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_only_the_first_gather_after_a_step_leaves_the_group(dtype: torch.dtype | None) -> None:
    found = {}
    for near in (1, 2):
        gathers = Gathers()
        model = tiny(extras=True)
        optimizer = adamw([p for p in model.parameters() if p.requires_grad])
        config = ds_zero.ZeroConfig(
            secondary_ranks=near, persistence_threshold_numel=0, param_dtype=dtype, prefetch=False
        )
        ds_zero.shard(model, optimizer, 3, config=config, comm=Comm(gathers, OrderedReduceScatter()))
        train(model, optimizer, range(1), micro=2)
        gathers.sizes.clear()
        train(model, optimizer, range(1, 2), micro=2)
        divided = [b for b in _registry.state_of(model).buckets if not b.whole]
        trained = [b for b in divided if b.trainable]
        if near == 1:
            total = len(gathers.sizes)
            assert set(gathers.sizes) == {4}
        else:
            assert gathers.sizes.count(4) == len(trained), "frozen ones never leave it again"
            assert len(gathers.sizes) == total, "the others stay inside"
            held = ds_zero.memory(model, optimizer).params_bytes
            assert held == sum((b.layout.padded_numel * b.full.element_size()) // 4 for b in divided) + sum(
                (b.layout.padded_numel * b.full.element_size()) // 2 for b in divided
            ) + sum(
                b.layout.padded_numel * b.full.element_size()
                for b in _registry.state_of(model).buckets
                if b.whole
            )
        train(model, optimizer, range(2, 4), micro=2)
        found[near] = whole(model)
        ds_zero.destroy(model)
    assert same(found[1], found[2])


@ranks(4)
def test_a_secondary_copy_follows_writes() -> None:
    model = tiny()
    optimizer = adamw(model.parameters())
    config = ds_zero.ZeroConfig(secondary_ranks=2, persistence_threshold_numel=0)
    ds_zero.shard(model, optimizer, 3, config=config)
    with torch.no_grad():
        model(*batch(0, 0))
    with ds_zero.gathered(list(model.parameters()), write=True), torch.no_grad():
        for param in model.parameters():
            param.zero_()
    with torch.no_grad():
        assert model(*batch(0, 0)).item() == pytest.approx(torch.tensor(37.0).log().item())
    saved = Memory(everyones(ds_zero.records(model, optimizer)))
    train(model, optimizer, range(1))
    with torch.no_grad():
        model(*batch(0, 0))
    ds_zero.load_records(model, optimizer, saved)
    assert all(not value.any() for value in whole(model).values())
    ds_zero.destroy(model)


@ranks(4)
def test_secondary_copies_can_be_made_again() -> None:
    for _ in range(2):
        model = tiny()
        config = ds_zero.ZeroConfig(secondary_ranks=2, persistence_threshold_numel=0)
        optimizer = adamw(model.parameters())
        ds_zero.shard(model, optimizer, 3, config=config)
        train(model, optimizer, range(1))
        ds_zero.destroy(model)


@ranks(3)
def test_a_group_that_does_not_divide_the_ranks_is_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="secondary_ranks=2 does not divide the 3 ranks"):
        ds_zero.shard(model, adamw(model.parameters()), 3, config=ds_zero.ZeroConfig(secondary_ranks=2))
    with pytest.raises(ValueError, match="secondary_ranks=0"):
        ds_zero.ZeroConfig(secondary_ranks=0)


# --- model parallelism


class Column(nn.Module):
    """Half of a linear layer on each of two ranks, plus a norm that both hold alike."""

    def __init__(self, index: int, mark: bool = True) -> None:
        super().__init__()
        full = torch.randn(8, 6, generator=torch.Generator().manual_seed(5))
        self.weight = nn.Parameter(full[4 * index : 4 * index + 4].clone())
        if mark:
            self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.scale = nn.Parameter(torch.full((6,), 1.25))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale) @ self.weight.T


@ranks(4, groups_may_stay=True)
@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("how", ["mark", "predicate"])
def test_norms_over_model_parallel_ranks(stage: int, how: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    index = mesh["tensor"].get_local_rank()
    model = Column(index, mark=how == "mark")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    group: Any = mesh["tensor"]
    if how == "predicate":
        group = ds_zero.ModelParallel(group=mesh["tensor"].get_group(), is_cut=lambda n, p: n == "weight")
    config = ds_zero.ZeroConfig(persistence_threshold_numel=0)
    ds_zero.shard(model, optimizer, stage, mesh["data"], config=config, model_parallel=group)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(mesh["data"].get_local_rank()))
    # As tensor parallelism does: what both hold alike gets the gradient of the whole layer on both.
    full = torch.cat([Column(0).weight, Column(1).weight]).detach().requires_grad_()
    scale = torch.full((6,), 1.25, requires_grad=True)
    grads = []
    for rank in range(2):
        data = torch.randn(3, 6, generator=torch.Generator().manual_seed(rank))
        grads.append(torch.autograd.grad((((data * scale) @ full.T) ** 2).sum(), (full, scale)))
    expected = ds_zero.total_norm([(a + b) / 2 for a, b in zip(*grads, strict=True)])
    with ds_zero.gathered(list(model.parameters())):
        pass
    hook = _SumOverTensor(mesh["tensor"].get_group())
    (hook(x * 1.0, model) ** 2).sum().backward()
    found = ds_zero.clip_grad_norm_(model, 1.0)
    torch.testing.assert_close(found, expected)


class _SumOverTensor:
    """Runs the layer so that the gradient of what is held alike is summed over tensor-parallel ranks."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def __call__(self, x: Tensor, model: nn.Module) -> Tensor:
        group = self._group

        def total(grad: Tensor) -> Tensor:
            grad = grad.clone()
            dist.all_reduce(grad, group=group)
            return grad

        model.get_parameter("scale").register_hook(total)
        out: Tensor = model(x)
        return out


@ranks(4, groups_may_stay=True)
def test_an_infinity_on_one_model_parallel_rank_is_known_to_all() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = Column(mesh["tensor"].get_local_rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, 1, mesh["data"], model_parallel=mesh["tensor"])
    factor = float("inf") if dist.get_rank() == 3 else 1.0
    (model(torch.ones(1, 6)) * factor).sum().backward()
    assert not torch.isfinite(ds_zero.clip_grad_norm_(model, 1.0))


# --- experts


class Experts(nn.Module):
    """Two experts, one on each expert-parallel rank; every token goes to both, by hand."""

    def __init__(self, mine: range) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.dense = nn.Linear(6, 6)
        made = [nn.Linear(6, 7, bias=False) for _ in range(2)]
        self.experts = nn.ModuleDict({f"e{i - mine.start}": made[i] for i in mine})


def expert_loss(out: Tensor, index: int) -> Tensor:
    return (out * torch.linspace(-1, 1, 7) + index).square().mean()


class _Swap(torch.autograd.Function):
    """All ranks' tokens on every expert-parallel rank; backward adds their gradients up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None


def tokens(step: int, rank: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + rank))


@ranks(4, groups_may_stay=True)
@pytest.mark.parametrize("stage", STAGES)
def test_experts_have_a_mesh_of_their_own(stage: int) -> None:
    """Two expert-parallel by two expert-data ranks against all experts in one process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("expert_data", "expert"))
    place = mesh["expert"].get_local_rank()
    model = Experts(range(place, place + 1))
    optimizer = adamw(model.parameters())
    ds_zero.shard(
        model,
        optimizer,
        stage,
        config=ds_zero.ZeroConfig(persistence_threshold_numel=0),
        mesh_for=lambda name, _: mesh["expert_data"] if name.startswith("experts") else None,
    )
    norms = []
    for step in range(3):
        x = torch.tanh(model.dense(tokens(step, dist.get_rank())))
        here = model.experts["e0"](_Swap.apply(x, mesh["expert"].get_group()))  # type: ignore[no-untyped-call]
        # This expert's part of the losses of both ranks; each loss is a mean over its own 4 tokens.
        sum(expert_loss(part, place) for part in here.chunk(2)).backward()  # type: ignore[union-attr]
        norms.append(ds_zero.clip_grad_norm_(model, 0.5).item())
        optimizer.step()
        optimizer.zero_grad()

    whole_model = Experts(range(2))
    params = list(whole_model.parameters())
    reference = adamw(params)
    expected = []
    for step in range(3):
        for rank in range(4):
            x = torch.tanh(whole_model.dense(tokens(step, rank)))
            losses = [expert_loss(whole_model.experts[f"e{i}"](x), i) for i in range(2)]
            (sum(losses) / 4).backward()  # type: ignore[union-attr]
        found = [p.grad for p in params if p.grad is not None]
        expected.append(ds_zero.total_norm(found).item())
        factor = min(0.5 / (expected[-1] + 1e-6), 1.0)
        torch._foreach_mul_(found, factor)
        reference.step()
        reference.zero_grad()
    assert norms == pytest.approx(expected, rel=1e-5)
    records = ds_zero.records(model, optimizer)
    experts = {(r.fqn, *r.coordinates.items()) for r in records if r.fqn.startswith("experts")}
    assert experts == {("experts.e0.weight", ("expert", (place, 2)))}
    assert all(not r.coordinates for r in records if not r.fqn.startswith("experts"))
    values = whole(model)
    torch.testing.assert_close(
        values["dense.weight"], whole_model.dense.weight.detach(), rtol=1e-4, atol=1e-5
    )
    mine = whole_model.experts[f"e{place}"].weight.detach()
    torch.testing.assert_close(values["experts.e0.weight"], mine, rtol=1e-4, atol=1e-5)


@ranks(4, groups_may_stay=True)
def test_expert_meshes_that_do_not_go_together_are_refused() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    model = tiny()
    with pytest.raises(
        ValueError, match=r"mesh_for gives 'embed.weight' a mesh of 4 ranks in 1 axes.*two axes"
    ):
        ds_zero.shard(
            model, adamw(model.parameters()), 1, mesh, mesh_for=lambda *_: DeviceMesh("cpu", [0, 1, 2, 3])
        )
    with pytest.raises(ValueError, match="a mesh of 4 ranks in 2 axes"):
        ds_zero.shard(model, adamw(model.parameters()), 1, mesh_for=lambda *_: mesh)


@ranks(4, groups_may_stay=True)
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("optimizer", ["muon", "lamb"])
def test_whole_tensors_and_segments_in_replicas(optimizer: str, stage: int) -> None:
    found = []
    for mesh in (init_device_mesh("cpu", (2, 2)), None):
        model = tiny()
        made = (
            Muon(muon_groups(model.named_parameters()), lr=0.02)
            if optimizer == "muon"
            else FusedLamb(model.parameters(), lr=0.02)
        )
        ds_zero.shard(model, made, stage, mesh, config=ds_zero.ZeroConfig(accumulation="sharded"))
        train(model, made, range(3))
        found.append(whole(model))
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=0, atol=1e-6)
