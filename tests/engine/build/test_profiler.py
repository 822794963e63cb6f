"""`flops_profiler`: one step of training is profiled, at every stage, and nothing else changes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import ds_engine
from harness import ranks

B, W = 4, 16


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(W, 2 * W), nn.GELU(), nn.Linear(2 * W, W))
        self.head = nn.Linear(W, 3)

    def forward(self, x):
        return self.head(self.body(x))


def config(stage, **profiler):
    return {
        "train_micro_batch_size_per_gpu": B,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        "startup_summary": False,
        "steps_per_print": 0,
        "flops_profiler": {"enabled": bool(profiler), **profiler},
    }


def train(settings, steps=4):
    torch.manual_seed(0)
    engine, *_ = ds_engine.initialize(model=Model(), config=settings)
    losses = []
    with engine:
        for step in range(2 * steps):
            x = torch.randn(B, W, generator=torch.Generator().manual_seed(step))
            loss = nn.functional.mse_loss(engine(x), torch.zeros(B, 3))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.module.modules())
    return losses, hooks


@ranks(2)
def test_the_profiled_step_has_the_work_of_its_formula_at_every_stage(tmp_path):
    rank = torch.distributed.get_rank()
    macs = 2 * B * (2 * W * 2 * W + 3 * W)  # two micro-batches
    for stage in (0, 1, 2, 3):
        file = tmp_path / f"profile{stage}.json"
        plain, hooks = train(config(stage))
        losses, hooks_after = train(config(stage, profile_step=2, output_file=str(file)))
        assert losses == plain
        assert hooks_after == hooks
        if rank == 0:
            profile = json.loads(file.read_text())
            assert (profile["step"], profile["ranks"], profile["forwards"]) == (2, 2, 2)
            model = profile["model"]
            assert model["forward_macs"] == macs
            # Of the first layer the gradient of the input is not needed.
            assert model["backward_macs"] == 2 * macs - 2 * B * 2 * W * W
            assert model["params"] == sum(p.numel() for p in Model().parameters())
            assert profile["outside_forward_flops"] > 0  # the loss


def test_report_on_the_terminal(capsys: pytest.CaptureFixture[str]):
    settings = config(0, module_depth=1, top_modules=2, detailed=False)
    train({**settings, "activation_checkpointing": {}})
    said = capsys.readouterr().err
    assert "FLOPs profile of step 1" in said
    assert "depth 1:" in said
    assert "depth 2:" not in said
    assert "FLOPS of the step" in said
    assert "All modules" not in said
    assert said.count("FLOPs profile") == 1


def test_recompute_factor_counts_what_can_not_be_seen(capsys: pytest.CaptureFixture[str]):
    train(config(0, recompute_fwd_factor=1.0, detailed=False))
    lines = {
        k.strip(): v.strip()
        for k, _, v in (line.partition(":") for line in capsys.readouterr().err.splitlines())
    }
    assert lines["recomputed forward FLOPs"] == lines["forward FLOPs"]
