"""The section `data_efficiency` in a training: variable batches with rates that follow them, samples by difficulty; and
both after a checkpoint, on another number of ranks."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

import ds_engine
from ds_engine.config import ConfigError, load
from ds_engine.sampling import TokenBatches, write_index
from ds_engine.schedules import WarmupLR
from engine.jobs import on_ranks
from harness import ranks

COUNT = 90
LENGTHS = np.array([1 + (7 * i * i + 3 * i) % 23 for i in range(COUNT)])


class Sentences(Dataset[int]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> int:
        return index


def collate(samples: list[int]) -> Tensor:
    """(samples, 2): the index, and its length."""
    return torch.stack([torch.tensor([i / COUNT, int(LENGTHS[i]) / 23.0]) for i in samples])


def indices(batch: Tensor) -> list[int]:
    return [round(float(x) * COUNT) for x in batch[:, 0]]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))


def sampling(**sections: Any) -> dict[str, Any]:
    return {"data_efficiency": {"enabled": True, "seed": 3, "data_sampling": {"enabled": True, **sections}}}


def start(section: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    config: dict[str, Any] = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 1,
        "startup_summary": False,
    }
    config |= {"optimizer": {"type": "SGD", "params": {"lr": 0.05}}, "gradient_clipping": 0.0}
    engine, _, loader, _ = ds_engine.initialize(
        model=net(), config=config | section | more, training_data=Sentences(), collate_fn=collate
    )
    return engine, loader


def tokens(folder: Path, **more: Any) -> dict[str, Any]:
    if not (folder / "seqlen").exists() and (not dist.is_initialized() or dist.get_rank() == 0):
        write_index(folder / "seqlen", LENGTHS)
    if dist.is_initialized():
        dist.barrier()
    section = {
        "enabled": True,
        "metrics_path": str(folder),
        "max_tokens": 30,
        "sequence_picking_order": "random",
    }
    return sampling(dynamic_batching=section | more)


def train(engine: Any, batches: Any, count: int) -> list[list[int]]:
    """The samples of each step, over all ranks."""
    found = []
    for _ in range(count):
        mine = []
        for batch in islice(batches, engine.gradient_accumulation_steps()):
            engine.backward(engine(batch).square().mean())
            engine.step()
            mine += indices(batch)
        everyone: list[Any] = [mine]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        found.append(sorted(x for share in everyone for x in share))
    return found


# --- dynamic_batching


WARMUP = {"warmup_max_lr": 0.05, "warmup_num_steps": 6, "warmup_type": "linear"}
SCHEDULE = {"scheduler": {"type": "WarmupLR", "params": WARMUP}}


@ranks(1, 2)
@pytest.mark.parametrize("method", ["linear", "sqrt", "none"])
def test_it_is_a_plain_loop_with_rates_that_follow(method: str, tmp_path: Path) -> None:
    engine, loader = start(tokens(tmp_path, lr_scaling_method=method), **SCHEDULE)
    with engine:
        steps = train(engine, iter(loader), 5)
        assert engine.global_samples == sum(map(len, steps)) and len({len(s) for s in steps}) > 1
        found = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        own_rate = engine.optimizer.param_groups[0]["lr"]

    model = net()
    order = TokenBatches(LENGTHS, loader.sampler.packing, batch=4, micro_batch=1, seed=3)
    lists = iter(order)
    unscaled = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = WarmupLR(unscaled, **WARMUP)
    for samples in steps:
        rate = unscaled.param_groups[0]["lr"]
        rate *= {"linear": len(samples) / 4, "sqrt": math.sqrt(len(samples) / 4), "none": 1.0}[method]
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        taken = [next(lists) for _ in range(4)]
        assert sorted(i for one in taken for i in one) == samples
        assert all(LENGTHS[one].sum() <= 30 for one in taken)
        for one in taken:
            (model(collate(one)).square().mean() / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert own_rate == unscaled.param_groups[0]["lr"] > 0, "the schedule does not notice"
    for name, value in model.named_parameters():
        assert torch.allclose(found[name], value, atol=1e-6), name


def save_in_the_middle(folder: Path, section: dict[str, Any], at: int, more: int) -> None:
    engine, loader = start(section)
    with engine:
        batches = iter(loader)
        train(engine, batches, at)
        engine.save_checkpoint(folder / "saved")
        then = train(engine, batches, more)
        if engine.world.rank == 0:
            weights = [p.tolist() for p in engine.module.parameters()]
            (folder / "then.json").write_text(json.dumps([then, weights]))


def go_on(folder: Path, section: dict[str, Any], at: int, more: int) -> None:
    engine, loader = start(section)
    with engine:
        engine.load_checkpoint(folder / "saved")
        then, weights = json.loads((folder / "then.json").read_text())
        assert train(engine, iter(loader), more) == then
        for value, wanted in zip(engine.module.parameters(), weights, strict=True):
            assert torch.allclose(value, torch.tensor(wanted), atol=1e-6)


@pytest.mark.parametrize(("saved", "loaded"), [(1, 2), (2, 1)])
def test_variable_batches_go_on_on_another_number_of_ranks(
    request: pytest.FixtureRequest, tmp_path: Path, saved: int, loaded: int
) -> None:
    write_index(tmp_path / "seqlen", LENGTHS)
    arguments: dict[str, Any] = {"folder": tmp_path, "section": tokens(tmp_path), "at": 2, "more": 3}
    on_ranks(request, saved, save_in_the_middle, **arguments)
    on_ranks(request, loaded, go_on, **arguments)


def test_other_batches_begin_anew_and_say_so(tmp_path: Path) -> None:
    engine, loader = start(tokens(tmp_path))
    with engine:
        train(engine, iter(loader), 1)
        engine.save_checkpoint(tmp_path / "saved")
    engine, loader = start(tokens(tmp_path, max_tokens=40))
    with engine:
        with pytest.warns(UserWarning, match="not restored: batches were packed with packing"):
            engine.load_checkpoint(tmp_path / "saved")
        with pytest.raises(ValueError, match="the batch sizes are fixed, because data_efficiency"):
            engine.set_train_batch_size(8)


def test_verbose_tells_the_batches(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for verbose in (False, True):
        engine, _ = start(tokens(tmp_path, verbose=verbose))
        engine.destroy()
        assert ("batches of 4 lists of at most 30 tokens" in capfd.readouterr().err) is verbose


# --- curriculum_learning


def measured(folder: Path, **metric: Any) -> dict[str, Any]:
    if not (folder / "seqlen").exists():
        write_index(folder / "seqlen", LENGTHS)
    numbers = {"total_curriculum_step": 10, "difficulty_step": 1}
    section = {"index_to_sample_path": str(folder / "seqlen"), "min_difficulty": 5, "max_difficulty": 23}
    section |= {"schedule_type": "fixed_linear", "schedule_config": numbers} | metric
    return sampling(curriculum_learning={"enabled": True, "curriculum_metrics": {"seqlen": section}})


@pytest.mark.parametrize("workers", [0, 2])
def test_short_sentences_first(tmp_path: Path, workers: int) -> None:
    section = measured(tmp_path)
    section["data_efficiency"]["data_sampling"]["num_workers"] = workers
    engine, loader = start(section)
    with engine:
        assert loader.loader.num_workers == workers
        told = []
        loader.post_process_func = lambda batch, state: told.append(state) or batch
        found = train(engine, iter(loader), 12)
        for step, samples in enumerate(found, start=1):
            bound = min(5 + math.floor(18 * step / 10), 23)
            assert len(samples) == 4 and LENGTHS[samples].max() <= bound
            assert told[4 * step - 4] == {"current_difficulties": {"seqlen": bound}}
        assert LENGTHS[[i for s in found[9:] for i in s]].max() > 14


@pytest.mark.parametrize(("saved", "loaded"), [(1, 2), (2, 1)])
def test_difficulties_go_on_on_another_number_of_ranks(
    request: pytest.FixtureRequest, tmp_path: Path, saved: int, loaded: int
) -> None:
    arguments: dict[str, Any] = {"folder": tmp_path, "section": measured(tmp_path), "at": 5, "more": 6}
    on_ranks(request, saved, save_in_the_middle, **arguments)
    on_ranks(request, loaded, go_on, **arguments)


def test_percentiles_and_num_epochs(tmp_path: Path) -> None:
    section = measured(
        tmp_path, difficulty_type="percentile", min_difficulty=10, max_difficulty=100,
        schedule_type="fixed_discrete", schedule_config={"difficulty": [10, 50, 100], "max_step": [3, 6]},
    )  # fmt: skip
    section["data_efficiency"]["data_sampling"]["num_epochs"] = 1
    engine, loader = start(section)
    with engine:
        easy = np.argsort(LENGTHS, kind="stable")
        assert len(loader) == COUNT // 4 * 4
        found = train(engine, iter(loader), 7)
        assert all(set(s) <= set(easy[: COUNT // 10].tolist()) for s in found[:3])
        assert all(set(s) <= set(easy[: COUNT // 2].tolist()) for s in found[3:6])
        assert sum(1 for _ in loader) == COUNT // 4 * 4 - 28, "a new iterator goes on"


def test_single_cluster_only_tells_and_custom_comes_from_code(tmp_path: Path) -> None:
    custom = {"clustering_type": "single_cluster", "schedule_type": "custom", "schedule_config": {}}
    section = measured(tmp_path, index_to_sample_path=None, **custom)
    engine, loader = start(section)
    with engine:
        loader.set_difficulties({"seqlen": lambda step: 3 * step})
        told = []
        loader.post_process_func = lambda batch, state: told.append(state["current_difficulties"]) or batch
        found = train(engine, iter(loader), 22)
        assert told[:8] == [{"seqlen": 3}] * 4 + [{"seqlen": 6}] * 4
        assert len({i for s in found for i in s}) == 88, "all samples, each once before any comes again"
    engine, loader = start({})
    with engine, pytest.raises(ValueError, match="curriculum_learning is not enabled"):
        loader.set_difficulties({"seqlen": lambda step: 3})


# --- what is refused


TOKENS = {"enabled": True, "max_tokens": 9, "metrics_path": "x"}
TOLD = {"enabled": True, "curriculum_metrics": {"a": {"clustering_type": "single_cluster"}}}
BY_HAND = {"managed_gradient_accumulation": False}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (sampling(dynamic_batching=TOKENS | {"max_tokens": None}), "needs max_tokens"),
        (sampling(dynamic_batching=TOKENS | {"metrics_path": None}), "needs metrics_path, a folder in which"),
        (
            sampling(dynamic_batching=TOKENS | {"min_batch_size": 3, "max_batch_size": 2}),
            "max_batch_size is below min_batch_size",
        ),
        (
            sampling(dynamic_batching=TOKENS, curriculum_learning=TOLD),
            "exclude each other: both decide which samples make a batch",
        ),
        (sampling(curriculum_learning={"enabled": True}), "needs curriculum_metrics"),
        (
            sampling(curriculum_learning=TOLD | {"curriculum_metrics": {"a": {}}}),
            "needs index_to_sample_path",
        ),
        (
            sampling(dynamic_batching=TOKENS) | BY_HAND,
            "managed_gradient_accumulation false exclude each other",
        ),
    ],
)
def test_settings_that_contradict_each_other(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load({"train_batch_size": 8} | section)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


def test_data_that_does_not_fit(tmp_path: Path) -> None:
    config = {"train_batch_size": 4, "optimizer": {"type": "SGD"}, "startup_summary": False}
    write_index(tmp_path / "seqlen", LENGTHS[:50])
    section = tokens(tmp_path)
    with pytest.raises(ConfigError, match="has the lengths of 50 samples, but training_data has 90"):
        ds_engine.initialize(model=net(), config=config | section, training_data=Sentences())
    with pytest.raises(ConfigError, match="has 50 samples, but training_data has 90"):
        ds_engine.initialize(model=net(), config=config | measured(tmp_path), training_data=Sentences())
    nowhere = tokens(tmp_path, metrics_path=str(tmp_path / "no"))
    with pytest.raises(ConfigError, match="neither a folder with manifest"):
        ds_engine.initialize(model=net(), config=config | nowhere, training_data=Sentences())
    with pytest.raises(ConfigError, match="training_data is an IterableDataset"):
        ds_engine.initialize(model=net(), config=config | section, training_data=Stream())
    with pytest.warns(UserWarning, match="has no effect without training_data"):
        engine, *_ = ds_engine.initialize(model=net(), config=config | section)
    engine.destroy()
