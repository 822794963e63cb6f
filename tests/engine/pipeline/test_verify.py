"""`ds verify` of pipelines: exact where the order of sums is the same, and a fault in one stage is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_engine.build.verify import verify
from ds_engine.config import load
from ds_pipe.model import LayerSpec, PipelineModule
from engine.pipeline.test_training import COUNT, config
from harness import ranks
from pipe.executor.models import Block, batches, loss_fn
from pipe.model.test_pipeline import VOCAB, WIDTH, layers, module

# (schedule, settings); with tied weights: their sums over stages are added in another order than in one process
EXACT: list[tuple[str, dict[str, Any]]] = [
    ("1f1b", {"zero_optimization": {"stage": 0}, "gradient_clipping": 0.1}),
    ("1f1b", {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}),
    ("zb-v", {"zero_optimization": {"stage": 1}}),
    ("interleaved", {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.1}),
    ("1f1b", {"zero_optimization": {"stage": 3}, "fp16": {"enabled": True, "initial_scale_power": 6}}),
]


def pairs(number: int) -> Any:
    return next(zip(*batches(1, number), strict=True))


@ranks(2)
def test_pipelines_are_exact() -> None:
    exact(EXACT[1:3])


@ranks(4)
def test_pipelines_of_two_data_ranks_are_exact() -> None:
    exact(EXACT[3:])


@pytest.mark.full
@ranks(2, 4)
def test_all_pipelines_are_exact() -> None:
    exact(EXACT)


def exact(rows: list[tuple[str, dict[str, Any]]]) -> None:
    for schedule, row in rows:
        found = verify(
            load(config(0, **row)), lambda s=schedule: module(2, schedule=s), pairs, steps=2, bitwise=True
        )
        assert found.exact, f"{schedule}, {row}: {found}"
        assert found.losses == found.plain_losses
        assert f"x {COUNT} a step" in found.what and " pipeline stages, " in found.what


@ranks(4)
def test_tied_weights_differ_by_rounding_only() -> None:
    found = verify(load(config(2, clip=0.5)), lambda: module(2, tied=True), pairs, steps=2)
    assert found.ok and found.losses == pytest.approx(found.plain_losses), str(found)


def without_seeds() -> tuple[PipelineModule, Any]:
    """Stages whose initial values depend on which layers a rank constructs; the inputs are an example."""
    made = PipelineModule(layers(), 2, loss_fn=loss_fn)
    return made, pairs(0)


def faulty() -> PipelineModule:
    """The second of two stages has a wrong gradient."""
    made = module(2)
    if made.stage_id == 1 and made.num_stages == 2:
        next(p for n, p in made.named_parameters() if n.endswith("weight")).register_hook(lambda g: 1.01 * g)
    return made


def dropping() -> PipelineModule:
    return PipelineModule(
        [nn.Embedding(VOCAB, WIDTH), nn.Dropout(0.5), LayerSpec(Block, WIDTH), nn.Linear(WIDTH, VOCAB)],
        2,
        loss_fn=loss_fn,
    )


@ranks(2)
def test_initial_values_are_taken_over_and_faults_are_found() -> None:
    settings = load(config(1))
    assert verify(settings, without_seeds, steps=2, bitwise=True).exact
    found = verify(settings, faulty, pairs, steps=2)
    first = found.first_beyond
    assert not found.ok and first is not None
    assert (first.step, first.kind) == (1, "gradient"), str(found)
    with pytest.raises(ValueError, match="draws random numbers"):
        verify(settings, dropping, pairs, steps=2)
    with pytest.raises(ValueError, match=r"PipelineModule\(loss_fn=...\): remove --loss"):
        verify(settings, without_seeds, pairs, lambda model, batch: torch.zeros(()))
