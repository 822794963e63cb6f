"""What `shard` refuses says what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

import ds_zero
from harness import ranks
from zero.models import Tiny


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("stage", [5, -1, True, "2"])
def test_stage(stage: int) -> None:
    model = Tiny()
    with pytest.raises(
        ValueError, match=r"there are stages 0 to 3 \(0 shards nothing; 1 shards optimizer states"
    ):
        ds_zero.shard(model, sgd(model), stage)


def test_sharding_twice() -> None:
    model = Tiny()
    _, optimizer = ds_zero.shard(model, sgd(model), 1)
    with pytest.raises(ValueError, match=r"ds_zero\.destroy\(model\)"):
        ds_zero.shard(model, optimizer, 1)


def test_no_parameters() -> None:
    model = nn.ReLU()
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        ds_zero.shard(model, sgd(Tiny()), 1)


def test_parameters_of_another_model() -> None:
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]\['params'\]\[0\].*is not a parameter of the model"
    ):
        ds_zero.shard(Tiny(), sgd(Tiny()), 1)


class Both(torch.optim.Optimizer):
    """Steps through an optimizer of its own."""

    def __init__(self, model: nn.Module, *, shared: bool) -> None:
        self.inner = sgd(model)
        super().__init__(self.inner.param_groups if shared else list(model.parameters()), {})
        if shared:
            self.param_groups = self.inner.param_groups

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.inner.step()


def test_an_optimizer_that_steps_through_another() -> None:
    model = Tiny()
    with pytest.raises(ValueError, match=r"Both\.inner is another optimizer \(SGD\).*'embed\.weight'"):
        ds_zero.shard(model, Both(model, shared=False), 0)


def test_one_that_shares_its_groups_is_taken() -> None:
    model = Tiny()
    ds_zero.shard(model, Both(model, shared=True), 0)


def test_two_parameters_that_share_memory() -> None:
    model = Tiny()
    model.head.weight = nn.Parameter(model.embed.weight.data)
    with pytest.raises(ValueError, match=r"'embed\.weight' and 'head\.weight' share memory"):
        ds_zero.shard(model, sgd(model), 1)


def test_an_optimizer_in_backward() -> None:
    model = Tiny()
    model.head.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match=r"'head\.weight' has a post-accumulate-grad hook"):
        ds_zero.shard(model, sgd(model), 1)


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_optimizers_that_cannot_work_are_named(name: str) -> None:
    model = Tiny()
    optimizer = getattr(torch.optim, name)(list(model.parameters()))
    with pytest.raises(ValueError, match=f"{name} does not work on shards: .*Use AdamW"):
        ds_zero.shard(model, optimizer, 1)


class Normalised(torch.optim.Optimizer):
    """A step of fixed length per tensor: not element-wise."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    p.sub_(group["lr"] * p.grad / p.grad.norm())


class Signs(Normalised):
    """Element-wise, and unknown to ds_zero."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad.sign())


class Demanding(Signs):
    def __init__(self, params: Iterable[Tensor], must: int) -> None:
        super().__init__(params)


class Declared(Demanding):
    elementwise = True


@ranks(2)
def test_an_unknown_optimizer_is_tried_on_a_tensor_cut_in_two() -> None:
    model = Tiny()
    flat = ds_zero.ZeroConfig(layout="flat")
    with pytest.raises(ValueError, match="Normalised gives another result if a tensor is split in two"):
        ds_zero.shard(model, Normalised(model.parameters()), 1, config=flat)
    ds_zero.shard(model, Normalised(model.parameters()), 0)
    model = Tiny()
    ds_zero.shard(model, Signs(model.parameters()), 1)
    model = Tiny()
    with pytest.raises(ValueError, match=r"Demanding could not be tested.*elementwise = True"):
        ds_zero.shard(model, Demanding(model.parameters(), 1), 1)
    ds_zero.shard(model, Declared(model.parameters(), 1), 1)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"accumulation": "globally"}, '"local", "sharded" or None'),
        ({"accumulation_steps": 0}, "accumulation_steps=0: give 1 or more"),
        ({"reduce_bucket_numel": 0}, "reduce_bucket_numel=0"),
        ({"persistence_threshold_numel": -1}, "persistence_threshold_numel=-1"),
        ({"param_dtype": torch.int8}, "param_dtype=torch.int8"),
    ],
)
def test_options(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ds_zero.ZeroConfig(**options)  # type: ignore[arg-type]


@ranks(2, groups_may_stay=True)
def test_a_mesh_of_two_axes() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    model = Tiny()
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))
    with pytest.raises(ValueError, match=r"mesh has 2 axes.*mesh\['data'\]"):
        ds_zero.shard(model, sgd(model), 1, mesh)
    ds_zero.shard(model, sgd(model), 1, mesh["data"])
    assert ds_zero.describe(model).num_ranks == 2
