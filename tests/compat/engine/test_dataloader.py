"""What scripts call on DeepSpeed's engine and data pipeline: who ends a batch, samples by difficulty, random-LTD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import deepspeed
from compat.engine.test_engine import config
from ds_engine.sampling import Analyzer

LENGTHS = [1 + (7 * i * i + 3 * i) % 23 for i in range(40)]


class Sentences(Dataset[Tensor]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), 1.0])


def lengths(batch: Tensor) -> Tensor:
    return torch.tensor([LENGTHS[int(i)] for i in batch[:, 0]])


def start(**more: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    return deepspeed.initialize(
        model=model, model_parameters=model.parameters(), training_data=Sentences(), config=config(0, **more)
    )


def test_a_curriculum_under_the_names_of_its_files(tmp_path: Path) -> None:
    from deepspeed.runtime.data_pipeline.data_sampling.data_analyzer import DataAnalyzer

    with pytest.raises(NotImplementedError, match=r"other arguments here: use ds_engine\.sampling\.Analyzer"):
        DataAnalyzer(Sentences())
    Analyzer(Sentences(), {"seqlen": lengths}, tmp_path).run()
    metric = {
        "index_to_sample_path": str(tmp_path / "seqlen" / "seqlen_index_to_sample"),
        "index_to_metric_path": str(tmp_path / "seqlen" / "seqlen_index_to_metric"),
        "min_difficulty": 1,
        "max_difficulty": 23,
        "schedule_type": "custom",
    }
    sampling = {"enabled": True, "curriculum_metrics": {"seqlen": metric}}
    section = {"enabled": True, "data_sampling": {"enabled": True, "curriculum_learning": sampling}}
    engine, _, loader, _ = start(data_efficiency=section)
    assert engine.curriculum_learning_enabled()
    engine.set_custom_curriculum_learning_schedule({"seqlen": lambda step: 8 if step < 3 else 23})
    told = []
    engine.set_data_post_process_func(lambda data, state: told.append(state["current_difficulties"]) or data)
    longest = [int(lengths(batch).max()) for batch, _ in zip(loader, range(30), strict=False)]
    assert max(longest[:2]) <= 8 < max(longest)
    assert told[:3] == [{"seqlen": 8}, {"seqlen": 8}, {"seqlen": 23}]
    engine.destroy()


def test_the_caller_may_end_batches() -> None:
    engine, *_ = start(managed_gradient_accumulation=False)
    with pytest.raises(AssertionError, match="every step"):
        engine.set_gradient_accumulation_boundary(False)
    for _ in range(3):
        assert not engine.is_gradient_accumulation_boundary()
        engine.backward(engine(torch.ones(4, 2)).mean())
    engine.step()
    assert (engine.global_steps, engine.global_samples) == (1, 12) and engine.was_step_applied()
    engine.destroy()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(2, 2), list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[1])
        return self.linear(x)  # type: ignore[no-any-return]


def test_random_ltd() -> None:
    from deepspeed.runtime.data_pipeline.data_routing.helper import convert_to_random_ltd

    schedule = {"min_value": 2, "max_value": 6, "schedule_config": {"require_steps": 2, "seq_per_step": 2}}
    section = {"enabled": True, "random_ltd_layer_id": [1], "random_ltd_schedule": schedule}
    routing = {"enabled": True, "data_routing": {"enabled": True, "random_ltd": section}}
    model = nn.Sequential(Block(), Block())
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config(0, data_efficiency=routing)
    )
    engine = convert_to_random_ltd(engine, Block)
    for _ in range(3):
        engine.backward(engine(torch.randn(4, 6, 2)).square().mean())
        engine.step()
    assert [block.seen for block in model] == [[6, 6, 6], [2, 4, 6]]
    engine.destroy()
