"""`verify` finds sharded training exact where it is, and says where it is not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

import ds_zero
from ds_zero.comm.direct import DirectAllGather, OrderedReduceScatter
from ds_zero.prove.deviation import compare, measured, rounded, ulps
from ds_zero.runtime.step import Stepper
from harness import ranks
from zero.models import Tiny, batch

Made = tuple[nn.Module, Optimizer]


def adamw(params: Iterable[Tensor], **more: Any) -> Optimizer:
    return torch.optim.AdamW(params, **{"lr": 1e-2, "weight_decay": 0.1, **more})


def make(**more: Any) -> Made:
    model = Tiny(layers=2, tied=True, extras=True)
    return model, adamw([p for p in model.parameters() if p.requires_grad], **more)


def data(number: int) -> tuple[Tensor, Tensor]:
    return batch(number, 0)


def check(build: Any = make, **options: Any) -> ds_zero.Verification:
    return ds_zero.verify(build, data, **{"steps": 2, **options})


# --- exact


ROWS = [
    # stage, micro-batches, config, other arguments
    (0, 1, {}, {}),
    (0, 3, {"accumulation": "sharded"}, {"clip": 0.3}),
    (1, 3, {"accumulation": "local", "param_dtype": torch.bfloat16}, {}),
    (1, 1, {"accumulation": "sharded", "overlap_publish": True}, {"clip": 0.3}),
    (2, 3, {"accumulation": "sharded", "param_dtype": torch.bfloat16}, {"clip": 0.3}),
    (2, 3, {"accumulation": "local", "grad_dtype": torch.bfloat16}, {}),
    (3, 3, {"accumulation": "sharded"}, {"deferred": True}),
    (3, 3, {"accumulation": "local", "communication_dtype": torch.bfloat16, "predivide_factor": 2.0}, {}),
    (3, 1, {"param_dtype": torch.bfloat16, "persistence_threshold_numel": 0}, {"clip": 0.3}),
    (3, 3, {"param_dtype": torch.float16}, {"loss_scale": 128.0, "clip": 0.3}),
    (2, 4, {"rank_invariant": True, "reduce_bucket_numel": 200}, {}),
]


@ranks(2)
def test_exact() -> None:
    for row in ROWS[::2]:
        judge(*row)


@pytest.mark.full
@ranks(2)
def test_exact_in_all_rows() -> None:
    for row in ROWS[1::2]:
        judge(*row)


@pytest.mark.full
@ranks(1, 3, 4)
def test_exact_on_other_numbers_of_ranks() -> None:
    for row in ROWS:
        judge(*row)


def judge(stage: int, micros: int, config: dict[str, Any], more: dict[str, Any]) -> None:
    found = check(stage=stage, accumulation_steps=micros, config=ds_zero.ZeroConfig(**config), **more)
    assert found.exact and found.ok and not found.differences, str(found)
    assert found.losses == found.plain_losses and len(set(found.losses)) == 2
    assert "EXACT" in str(found) and json.loads(found.to_json())["ok"] is True


class Dropout(nn.Module):
    """Random numbers and a buffer that every rank moves in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def dropout() -> Made:
    model = Dropout()
    return model, adamw(model.parameters())


def squares(model: Any, x: Tensor) -> Tensor:
    found: Tensor = model(x).square().mean()
    return found


@ranks(4, groups_may_stay=True)
def test_replicas_and_secondary_copies() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    report = check(stage=3, mesh=mesh, accumulation_steps=2, clip=0.3, steps=1)
    assert report.exact, str(report)
    near = ds_zero.ZeroConfig(secondary_ranks=2, persistence_threshold_numel=0, param_dtype=torch.bfloat16)
    report = check(stage=3, config=near, steps=1)
    assert report.exact, str(report)
    with pytest.raises(ValueError, match="mesh has 2 ranks, the process group 4"):
        check(mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "y"))["y"])


@ranks(2)
def test_dropout_and_running_averages() -> None:
    x = [torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = ds_zero.verify(dropout, x, squares, stage=3, accumulation_steps=2)
    assert found.exact, str(found)
    assert any("dropout" in note for note in found.notes)
    assert torch.equal(before, torch.get_rng_state())


@ranks(2)
def test_steps_that_are_left_out_and_a_schedule() -> None:
    found = check(
        config=ds_zero.ZeroConfig(param_dtype=torch.float16),
        loss_scale=ds_zero.DynamicScale(initial_scale=2.0**24, hysteresis=1),
        schedule=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        steps=12,
    )
    assert found.exact, str(found)
    assert any("steps were skipped" in note for note in found.notes) and len(set(found.losses)) == 12


# --- what rounding explains


class Rough(torch.optim.AdamW):
    """Rounds some elements of shards to the other neighbour, as kernels do whose tails are unlike their bodies."""

    elementwise = True

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        for shard in self.param_groups[0]["params"]:
            if shard.ndim == 1 and shard.numel() > 3:
                last = shard.detach()[-3:]
                last.copy_(torch.nextafter(last, last + 1))


def rough() -> Made:
    model = Tiny(layers=2)
    return model, Rough(model.parameters(), lr=1e-2)


@ranks(2)
def test_an_optimizer_whose_rounding_depends_on_the_cut() -> None:
    found = check(rough, stage=2, steps=4)
    assert found.ok and not found.exact and found.first is not None, str(found)
    assert found.first.kind == "parameter" and 0 < found.first.max_ulp
    assert found.first.bound is not None and found.first.max_abs <= found.first.bound < 1e-2
    assert "WITHIN ROUNDING" in str(found)
    again = check(rough, stage=2, steps=2, bitwise=True)
    assert not again.ok and "NOT EXACT" in str(again)


@pytest.mark.full
@ranks(2, 3, 4)
def test_the_backends_own_order_of_sums() -> None:
    for dtype in (None, torch.bfloat16):
        config = ds_zero.ZeroConfig(ordered_reduction=False, param_dtype=dtype)
        found = check(stage=2, steps=5, accumulation_steps=2, config=config)
        assert found.ok, str(found)
        assert found.exact == (dist.get_world_size() == 2 and dtype is None), str(found)


# --- faults


def scaled_on_rank_1() -> Made:
    """Rank 1 never runs the plain training, so this is a fault of the sharded one."""
    model, optimizer = make()
    calls = []

    def scale(grad: Tensor) -> Tensor:
        calls.append(grad)
        return grad * 1.01 if len(calls) > 1 else grad

    if dist.get_rank() == 1:
        model.get_parameter("blocks.1.up.weight").register_hook(scale)
    return model, optimizer


@ranks(2)
@pytest.mark.parametrize("stage", [0, 1, pytest.param(2, marks=pytest.mark.full), 3])
def test_a_gradient_that_one_rank_scales(stage: int) -> None:
    config = ds_zero.ZeroConfig(param_dtype=torch.bfloat16 if stage == 3 else None)
    found = check(scaled_on_rank_1, stage=stage, steps=3, config=config)
    first = found.first_beyond
    assert not found.ok and first is not None and first is found.first, str(found)
    assert (first.step, first.kind, first.name) == (2, "gradient", "blocks.1.up.weight")
    assert first.module == "blocks.1.up (Linear)" and first.max_ulp > 1
    assert first.bound is not None and first.bound < first.max_abs
    text = str(found)
    assert "DEVIATES in step 2: gradient of blocks.1.up.weight, module blocks.1.up (Linear)" in text
    told = json.loads(found.to_json())
    assert told["ok"] is False and told["first_beyond"]["name"] == "blocks.1.up.weight"


class Forgetful(torch.optim.AdamW):
    """Does not step the third entry where entries are shards."""

    elementwise = True

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        third = self.param_groups[0]["params"][3]
        if third.ndim == 1 and third.grad is not None and "exp_avg" in self.state[third]:
            third.grad = None
        super().step()


def forgetful() -> Made:
    model = Tiny(layers=2)
    return model, Forgetful(model.parameters(), lr=1e-2)


@ranks(2)
def test_a_tensor_that_is_not_stepped() -> None:
    name = [n for n, _ in Tiny(layers=2).named_parameters()][3]
    found = check(forgetful, stage=1, steps=3)
    first = found.first_beyond
    assert not found.ok and first is not None, str(found)
    assert (first.step, first.kind, first.name) == (2, "parameter", name)


class Counted:
    """A factory whose first model, the sharded one, gets another optimizer than the plain one."""

    def __init__(self, **wrong: Any) -> None:
        self.wrong, self.calls = wrong, 0

    def __call__(self) -> Made:
        self.calls += 1
        return make(**self.wrong) if self.calls == 1 else make()


@ranks(2)
def test_a_wrong_hyper_parameter() -> None:
    for wrong in ({"lr": 1.02e-2}, {"betas": (0.9, 0.99)}, {"weight_decay": 0.0}):
        found = check(Counted(**wrong), stage=2, steps=3)
        first = found.first_beyond
        assert not found.ok and first is not None, f"{wrong}: {found}"
        kind = "state exp_avg_sq" if "betas" in wrong else "parameter"
        assert (first.kind, first.step) == (kind, 1), f"{wrong}: {found}"


class Lossy(OrderedReduceScatter):
    """Drops the first element of what arrives."""

    def __call__(self, output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        work = super().__call__(output, input, *args, **kwargs)
        if work is not None:
            work.wait()
        output[0] = 0.0
        return None


def plain_sgd() -> Made:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def vectors(number: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(number))


@ranks(2)
def test_faulty_collectives() -> None:
    lossy = ds_zero.verify(plain_sgd, vectors, stage=2, comm=ds_zero.Comm(DirectAllGather(), Lossy()))
    assert not lossy.ok and lossy.first is not None and lossy.first.kind == "gradient", str(lossy)
    assert lossy.first.step == 1 and lossy.first.differing == 1
    with mock.patch.object(Stepper, "_start_publish"):  # other ranks' parameters stay as they were
        stale = ds_zero.verify(plain_sgd, vectors, stage=1)
    assert not stale.ok and stale.first is not None, str(stale)
    assert (stale.first.step, stale.first.kind) == (2, "loss"), (
        "masters are right, and forward does not see them"
    )


# --- what cannot be judged


@ranks(2)
def test_mistakes_are_errors_on_every_rank() -> None:
    shared = make()
    with pytest.raises(ValueError, match=r"same object twice|sharded already|start with other values"):
        check(lambda: shared)
    torch.manual_seed(0)
    own = torch.Generator().manual_seed(3)

    def unlike() -> Made:
        model, optimizer = make()
        with torch.no_grad():
            model.get_parameter("head.weight").add_(torch.rand(1, generator=own))
        return model, optimizer

    with pytest.raises(ValueError, match=r"start with other values.*'embed.weight'"):
        check(unlike)
    with pytest.raises(ValueError, match="no micro-batches"):
        ds_zero.verify(make, [])
    with pytest.raises(ValueError, match="stage=7"):
        check(stage=7)
    with pytest.raises(ValueError, match="steps=0"):
        check(steps=0)


class Unlucky(nn.Module):
    """Breaks in the plain training alone."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.inner, self.plain = nn.Linear(8, 8), plain

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            raise KeyError("only in plain training")
        return self.inner(x)


@ranks(2)
def test_an_error_of_the_plain_training_is_raised_everywhere() -> None:
    calls: list[int] = []

    def build() -> Made:
        calls.append(1)
        model = Unlucky(len(calls) > 1)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(KeyError, match="only in plain training"):
        ds_zero.verify(build, vectors)


# --- the parts


def test_units_in_the_last_place() -> None:
    one = torch.tensor([1.0, 0.0, -0.0, math.nan, 1.0, -1e-45, math.inf])
    two = torch.tensor([1.0, -0.0, 1e-45, math.nan, math.nan, 1e-45, math.inf])
    assert ulps(one, two).tolist() == [0, 0, 1, 0, torch.iinfo(torch.int64).max, 2, 0]
    assert ulps(torch.tensor([1.0]), torch.nextafter(torch.tensor([1.0]), torch.tensor([2.0]))).tolist() == [
        1
    ]
    half = torch.tensor([1.0, -1.0], dtype=torch.bfloat16)
    assert ulps(half, half + torch.finfo(torch.bfloat16).eps).tolist() == [1, 2]
    wide = torch.tensor([1.0], dtype=torch.float64)
    assert ulps(wide, wide + torch.finfo(torch.float64).eps).tolist() == [1]
    wide = wide * 1e300
    assert ulps(wide, -wide).item() == torch.iinfo(torch.int64).max  # does not fit


def test_the_worst_element_is_named() -> None:
    one = torch.zeros(3, 4)
    two = one.clone()
    two[1, 2], two[0, 0] = 0.5, 1e-3
    found = compare(two, one, step=3, kind="parameter", name="a.b", module="a (Linear)")
    assert found is not None and (found.at, found.found, found.plain) == ((1, 2), 0.5, 0.0)
    assert (found.differing, found.numel, found.max_abs) == (2, 12, 0.5)
    assert compare(one, one.clone(), step=1, kind="parameter", name="a") is None
    assert compare(None, None, step=1, kind="gradient", name="a") is None
    missing = compare(None, one, step=1, kind="gradient", name="a")
    assert missing is not None and missing.max_abs == math.inf and "NaN" in str(missing)


def test_bounds_follow_what_was_measured() -> None:
    one, big = torch.ones(3), torch.tensor([2.0])
    found = measured([("lucky", big, big), ("one", one, one + 1e-3), ("other", one, one + 2e-3)])
    assert found["other"] == pytest.approx(8e-3, rel=1e-3)
    assert found["lucky"] == pytest.approx(2 * 4e-3, rel=1e-3), "as half of all tensors, at its own scale"
    assert found["one"] == pytest.approx(4e-3, rel=1e-3)
    unit = torch.finfo(torch.float32).eps
    assert measured([("still", big, big)]) == {"still": 8 * unit} and rounded(-big) == 32 * unit


def test_a_model_that_computes_by_itself() -> None:
    """On one process, without a group, with a loss of the user's own."""

    def loss(model: nn.Module, sample: Tensor) -> Tensor:
        return F.mse_loss(model(sample), sample)

    found = ds_zero.verify(plain_sgd, [vectors(0), vectors(1)], loss, stage=3, steps=5)
    assert found.exact and found.ranks == 1 and found.steps == 5
