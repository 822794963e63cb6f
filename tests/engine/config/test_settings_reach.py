"""Keys that reach ds_zero change what it does, seen from the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_engine
import ds_zero
from ds_engine.build import zero
from ds_engine.build.topology import arranged
from ds_engine.config import load
from ds_engine.job import choices_of, describe
from engine import jobs
from harness import ranks


def trained(steps: int = 3, **more: Any) -> tuple[list[float], ds_engine.Engine]:
    engine = jobs.engine(0, **more)
    return jobs.train(engine, steps), engine


def at(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **keys}}


@ranks(4, groups_may_stay=True)
def test_groups_of_ranks_that_hold_replicas() -> None:
    """Two groups of two: a rank holds half of the model, not a quarter, and the training is the same."""
    losses, owned = {}, {}
    for size in (-1, 2, 4):
        losses[size], engine = trained(**at(3, mics_shard_size=size))
        owned[size] = ds_zero.describe(engine.module).owned_numel
        engine.destroy()
    assert owned[2] > 1.5 * owned[-1] and owned[4] == owned[-1]
    assert losses[2] == pytest.approx(losses[-1], rel=1e-5)
    with pytest.raises(
        ds_engine.ConfigError, match="mics_shard_size 3 does not divide 4 data-parallel ranks"
    ):
        jobs.engine(0, **at(3, mics_shard_size=3))


@ranks(2)
def test_gradients_are_added_or_averaged() -> None:
    norms = {}
    for op in ("mean", "sum"):
        _, engine = trained(1, gradient_clipping=0, gradient_allreduce_op=op)
        norms[op] = engine.get_global_grad_norm() or 0
        engine.destroy()
    assert norms["sum"] == pytest.approx(2 * norms["mean"], rel=1e-6) and norms["mean"] > 0


@ranks(2)
@pytest.mark.parametrize("keys", [{"prescale_gradients": True}, {"gradient_predivide_factor": 4.0}])
def test_dividing_before_the_sum_changes_no_mean(keys: dict[str, Any]) -> None:
    """Powers of two change no bit of it."""
    plain, engine = trained()
    engine.destroy()
    assert trained(**keys)[0] == plain


@ranks(2)
def test_gradients_travel_in_the_dtype_that_is_asked_for() -> None:
    plain, engine = trained(scheduler=None)
    engine.destroy()
    narrow, engine = trained(scheduler=None, communication_data_type="bf16")
    assert narrow[:2] == plain[:2] and narrow != plain
    torch.testing.assert_close(torch.tensor(narrow), torch.tensor(plain), rtol=0.05, atol=0.05)


@ranks(2)
def test_unused_parameters_are_an_error_where_that_is_asked_for() -> None:
    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    for ignore in (True, False):
        config = jobs.config(scheduler=None, **at(2, ignore_unused_parameters=ignore))
        engine, *_ = ds_engine.initialize(model=Half(), config={**config, "gradient_accumulation_steps": 1})
        engine.backward(engine(torch.ones(8, 4)).mean())
        if ignore:
            engine.step()
        else:
            with pytest.raises(ValueError, match="unused"):
                engine.step()
        engine.destroy()
    dist.barrier()


@ranks(2)
@pytest.mark.parametrize(
    "keys",
    [
        at(1, allgather_bucket_size=50),
        at(2, reduce_scatter=False),
        at(2, overlap_comm=False),
        at(3, overlap_comm=True),
        at(3, zero_hpz_partition_size=2),
        at(3, stage3_param_persistence_threshold=1000, stage3_model_persistence_threshold=50),
    ],
)
def test_settings_of_speed_change_no_bit(keys: dict[str, Any]) -> None:
    stage = keys["zero_optimization"]["stage"]
    plain, engine = trained(**at(stage))
    engine.destroy()
    assert trained(**keys)[0] == plain


@ranks(2)
@pytest.mark.parametrize("name", ["Muon", "Lamb", "Adafactor"])
def test_optimizers_of_whole_tensors_train_alike_at_every_stage(name: str) -> None:
    losses = {}
    for stage in (0, 1, 3):
        losses[stage], engine = trained(
            3, scheduler=None, optimizer={"type": name, "params": {"lr": 0.01}}, **at(stage)
        )
        engine.destroy()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[3] == pytest.approx(losses[0], rel=1e-4)


def zero_config(model: torch.nn.Module, **keys: Any) -> ds_zero.ZeroConfig:
    settings = load(jobs.config(3, **at(3, **keys)))
    job = describe(choices_of(settings), arranged(settings, 0, 1), "cpu")
    return zero.zero_config(job, model)


def test_limits_of_gathering_reach_ds_zero() -> None:
    keys = {
        "stage3_prefetch_bucket_size": 11,
        "stage3_max_live_parameters": 12,
        "stage3_max_reuse_distance": 13,
    }
    made = zero_config(jobs.net(), **keys, stage3_module_granularity_threshold=14)
    assert (made.prefetch_numel, made.max_live_numel, made.max_reuse_distance_numel) == (11, 12, 13)
    assert made.module_granularity_numel == 14


def test_leaf_modules_by_class_name_and_suffix() -> None:
    def leaves(**section: Any) -> tuple[Any, ...]:
        return zero_config(jobs.net(), leaf_module=section).leaf_modules

    assert (
        leaves(classes=["Sequential"])
        == leaves(classes=["torch.nn.modules.container.Sequential"])
        == ("inner",)
    )
    assert leaves(names=["inner"]) == leaves(name_suffixes=["ner"]) == ("inner",)
    assert zero_config(jobs.net()).leaf_modules == ()  # the classes of the default may be absent
    with pytest.raises(ds_engine.ConfigError, match=r"leaf_module\.names: the model has no 'gone'"):
        leaves(names=["gone"])


@ranks(2)
def test_limits_and_leaves_change_no_loss() -> None:
    plain, engine = trained(**at(3))
    engine.destroy()
    keys = {
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 50,
        "stage3_max_reuse_distance": 0,
    }
    other, engine = trained(**at(3, **keys, leaf_module={"names": ["inner"]}))
    engine.destroy()
    assert other == plain
