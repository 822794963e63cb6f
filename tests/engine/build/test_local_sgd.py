"""The section `local_sgd`: DiLoCo under the engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_comm.optim
import ds_engine
from ds_checkpoint import CheckpointError
from ds_comm.compress import TopKCompressor
from ds_core.optim import FusedAdam
from ds_engine.build.memory.predict import predicted
from ds_engine.build.topology import arranged
from ds_engine.config import load
from ds_engine.job import choices_of, describe
from engine import jobs
from engine.build.test_self_reducing import batch_of, net, train, weights
from harness import ranks

SECTION = {"sync_every": 3, "start_step": 2, "outer_lr": 0.5, "outer_momentum": 0.6}
SPARSE = {"compression": "topk", "density": 0.125, "residual_dtype": "bf16"}


def config_of(steps: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": steps,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.02}},
        "local_sgd": SECTION,
        "startup_summary": False,
        **more,
    }


def engine_of(steps: int = 1, **more: Any) -> ds_engine.Engine:
    return ds_engine.initialize(net(), config_of(steps, **more))[0]


@ranks(2)
def test_the_engine_trains_like_a_plain_loop() -> None:
    for steps, more in ((1, {}), (2, SPARSE)):
        with engine_of(steps, gradient_clipping=0.5, local_sgd={**SECTION, **more}) as engine:
            losses = train(engine, 0, 10)
            norm = engine.get_global_grad_norm()
            trained = weights(engine)
        model = net()
        options = ds_comm.optim.CompressionOptions(
            compressor=TopKCompressor(block_numel=4096, kept=512), residual_dtype=torch.bfloat16
        )
        optimizer = ds_comm.optim.LocalSGD(
            FusedAdam(model.parameters(), lr=0.02),
            ds_comm.optim.nesterov(0.5, 0.6),
            3,
            start_step=2,
            max_grad_norm=0.5,
            compression=options if more else None,
        )
        expected = []
        for step in range(10):
            for micro in range(steps):
                x, y = batch_of(step, micro, dist.get_rank())
                loss = (model(x) - y).square().mean()
                expected.append(loss.item())
                (loss / steps).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses == pytest.approx(expected, rel=1e-5)
        for a, b in zip(trained, model.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach())
        assert optimizer.report is not None
        assert norm == pytest.approx(optimizer.report.grad_norm, rel=1e-4)


@ranks(2)
def test_training_continues_exactly_and_on_another_number_of_ranks(tmp_path: Path) -> None:
    sparse = {**SECTION, **SPARSE}
    with engine_of(local_sgd=sparse) as engine:
        train(engine, 0, 7)
        with pytest.raises(CheckpointError, match="save after a step where"):
            engine.save_checkpoint(tmp_path)
        train(engine, 7, 8)
        assert engine.optimizer.synchronised  # type: ignore[attr-defined]
        engine.save_checkpoint(tmp_path)
        expected, after = train(engine, 8, 13), weights(engine)
        moments = [s["exp_avg"].clone() for s in engine.optimizer.state.values()]
    with engine_of(local_sgd=sparse) as engine:
        engine.load_checkpoint(tmp_path)
        assert train(engine, 8, 13) == expected
        assert all(torch.equal(a, b) for a, b in zip(after, weights(engine), strict=True))
    every: list[Any] = [None, None]
    dist.all_gather_object(every, moments)
    assert not torch.equal(every[0][0], every[1][0])  # states of the inner optimizer differ between ranks


def save(folder: str) -> None:
    with engine_of() as engine:
        train(engine, 0, 8)
        engine.save_checkpoint(folder)


def resume_alone(folder: str) -> None:
    with engine_of() as engine:
        engine.load_checkpoint(folder)
        losses = train(engine, 8, 14)
        assert engine.optimizer.synchronised  # type: ignore[attr-defined]
        assert all(math.isfinite(loss) for loss in losses)


def test_a_checkpoint_of_two_ranks_on_one(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    jobs.on_ranks(request, 2, save, folder=str(tmp_path))
    jobs.on_ranks(request, 1, resume_alone, folder=str(tmp_path))


def test_the_plan_counts_anchors_and_the_bytes_of_an_outer_step() -> None:
    plans = {}
    sections: dict[str, Any] = {
        "none": None,
        "local": SECTION,
        "sparse": {**SECTION, **SPARSE, "density": 0.001},
    }
    for name, section in sections.items():
        settings = load(config_of(local_sgd=section))
        job = describe(choices_of(settings), arranged(settings, 0, 2), "cpu")
        plans[name] = predicted(job, net(), micro_batch=torch.zeros(4, 8))
    numel = sum(p.numel() for p in net().parameters())
    states = {name: plan.phases[-1].parts["states"] for name, plan in plans.items()}
    assert states["local"] - states["none"] == 8 * numel  # anchors and the outer momentum
    assert states["sparse"] - states["local"] == pytest.approx(3 * numel, abs=8)  # residuals: 1.5 x bf16
    sent = {name: sum(plan.sent_bytes.values()) for name, plan in plans.items()}
    assert sent["none"] >= 4 * numel
    assert sent["local"] < 0.6 * sent["none"]  # a third, but biases are padded
    assert sent["sparse"] < sent["local"]
