"""A checkpoint holds all experts: another expert-parallel size loads it, with the optimizer's states (DS#8147)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW

import ds_checkpoint
import ds_engine
import ds_moe
import ds_zero
from harness import ranks
from moe.small import Small, batch

CONFIG = ds_zero.ZeroConfig(persistence_threshold_numel=0)


def job(ep: int, stage: int) -> tuple[Small, AdamW, ds_moe.ExpertMesh]:
    model = Small(ep, k=2, drop_tokens=False)
    mesh_for = ds_moe.expert_mesh(model)
    optimizer = AdamW(model.parameters(), lr=0.02, foreach=True)
    ds_zero.shard(model, optimizer, stage, config=CONFIG, mesh_for=mesh_for)
    return model, optimizer, mesh_for


def step(model: nn.Module, optimizer: AdamW, number: int) -> float:
    loss = model(batch(number, dist.get_rank()))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()  # type: ignore[no-any-return]


def all_experts(model: nn.Module, ep: int) -> dict[str, torch.Tensor]:
    """Every parameter and moment; those of experts with all experts, put together from the ranks' own."""
    values = {}
    for name, _ in model.named_parameters():
        for kind in ("param", "exp_avg", "exp_avg_sq", "step"):
            own = ds_zero.get_full(model, name, kind)
            assert own is not None
            if ".experts." in name and kind != "step":
                runs = [torch.empty_like(own) for _ in range(dist.get_world_size())]
                dist.all_gather(runs, own.contiguous())
                own = torch.cat(runs[:ep])
            values[f"{name} {kind}"] = own
    return values


@ranks(4, groups_may_stay=True, timeout_s=120)
def test_another_number_of_expert_ranks_loads_moments_bitwise(tmp_path: Path) -> None:
    model, optimizer, _ = job(2, 2)
    for number in range(3):
        step(model, optimizer, number)
    ds_checkpoint.save(tmp_path / "plain", model, optimizer)
    expected = all_experts(model, 2)
    assert expected["layers.0.experts.expert.up.weight exp_avg"].shape == (4, 12, 8)
    following = [step(model, optimizer, number) for number in (3, 4)]
    for ep, stage in ((1, 3), (4, 1), (2, 0), (4, 3)):
        other, fresh, _ = job(ep, stage)
        with torch.no_grad():
            ds_zero.set_full(other, "first.weight", "param", torch.zeros(8, 8))
        ds_checkpoint.load(tmp_path / "plain", other, fresh)
        loaded = all_experts(other, ep)
        assert loaded.keys() == expected.keys()
        for name, value in loaded.items():
            assert torch.equal(value, expected[name]), (ep, stage, name)
        assert [step(other, fresh, number) for number in (3, 4)] == pytest.approx(following, rel=1e-4)


@ranks(4, groups_may_stay=True, timeout_s=120)
def test_through_the_engine(tmp_path: Path) -> None:
    def engine_of(ep: int, stage: int) -> ds_engine.Engine:
        config = {
            "train_micro_batch_size_per_gpu": 9,
            "gradient_clipping": 0.5,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.02}},
            "startup_summary": False,
        }
        engine, *_ = ds_engine.initialize(model=Small(ep, k=2, drop_tokens=False), config=config)
        return engine

    def steps(engine: ds_engine.Engine, numbers: range) -> list[float]:
        losses = []
        for number in numbers:
            loss = engine(batch(number, dist.get_rank()))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses

    first = engine_of(2, 2)
    steps(first, range(3))
    first.save_checkpoint(tmp_path, tag="three")
    expected = all_experts(first.module, 2)
    following = steps(first, range(3, 5))
    for ep, stage in ((4, 3), (1, 1)):
        other = engine_of(ep, stage)
        other.load_checkpoint(tmp_path, tag="three")
        for name, value in all_experts(other.module, ep).items():
            assert torch.equal(value, expected[name]), (ep, stage, name)
        assert steps(other, range(3, 5)) == pytest.approx(following, rel=1e-4)
        [report, _] = ds_moe.reports(other.module)
        assert report.tokens == 2 * 9 * 4 and sum(report.load) == 2 * report.tokens and report.dropped == 0
        assert (report.sent_bytes > 0) == (ep > 1)
    whole = ds_zero.full_state_dict(other.module)
    if dist.get_rank() == 0:
        assert whole["layers.0.experts.expert.up.weight"].shape == (4, 12, 8)
        assert not whole["last.bias"].isnan().any()


@ranks(2, groups_may_stay=True)
def test_experts_that_are_not_stacked_load_with_the_same_number_of_ranks_only(tmp_path: Path) -> None:
    layers = []
    for ep in (2, 1):
        model = ds_moe.MoE(8, nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), 4, ep, drop_tokens=False)
        mesh_for = ds_moe.expert_mesh(model)
        optimizer = AdamW(model.parameters(), foreach=True)
        ds_zero.shard(model, optimizer, 3, config=CONFIG, mesh_for=mesh_for)
        layers.append((model, optimizer))
    for x in (torch.randn(5, 8), torch.randn(0, 8)):
        out, aux, _ = layers[0][0](x if dist.get_rank() == 0 else x[:0])
        (out.sum() + aux).backward()
    layers[0][1].step()
    ds_checkpoint.save(tmp_path / "looped", *layers[0])
    ds_checkpoint.load(tmp_path / "looped", *layers[0])
    with pytest.raises(ds_checkpoint.CheckpointError, match="groups of"):
        ds_checkpoint.load(tmp_path / "looped", *layers[1])
