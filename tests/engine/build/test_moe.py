"""Curves of experts: the load of each, dropped assignments, entropy, over all ranks."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_engine
import ds_moe
from compose.jobs import WIDTH, language_model, tokens_of
from ds_moe.routing.capacity import capacity_of
from harness import ranks


class Net(nn.Module):
    def __init__(self, ep_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.moe = ds_moe.MoE(
            8,
            lambda: ds_moe.FeedForward(8, 16),
            4,
            ep_size,
            capacity_factor=0.5,
            min_capacity=1,
            use_rts=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)[0].square().mean()


class Dropping(nn.Module):
    """Experts in place of a feed-forward block, which take an odd number of tokens (DS#8195)."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = ds_moe.MoE(
            WIDTH,
            lambda: ds_moe.FeedForward(WIDTH, 32),
            4,
            k=1,
            capacity_factor=0.75,
            min_capacity=1,
            use_rts=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.moe(x)[0]
        return out


def dropping() -> nn.Module:
    model = language_model(0)
    model.model.layers[1].mlp = Dropping()  # type: ignore[union-attr]
    return model


@ranks(2, groups_may_stay=True)
def test_an_odd_capacity_beside_tensor_parallelism() -> None:
    """No token is lost but those beyond the capacity."""
    assert [capacity_of(4 * tokens, 4, 1, 0.75, 1) for tokens in (5, 3, 4)] == [4, 3, 3]
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "gradient_clipping": 0.0,
        "tensor_parallel": {"autotp_size": 2},
        "startup_summary": False,
    }
    engine, *_ = ds_engine.initialize(dropping(), config)
    plain = dropping()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for step, length in enumerate((3, 4, 5)):
        tokens = tokens_of(step, range(4))[:, :length]
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        expected = plain(input_ids=tokens, labels=tokens).loss
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5), f"step {step}"
    (report,) = ds_moe.reports(engine.module)
    assert report.dropped > 0
    engine.destroy()


def values(folder: Path, name: str) -> list[float]:
    with (folder / "job" / f"Train_Experts_moe_{name}.csv").open() as file:
        return [float(row[1]) for row in list(csv.reader(file))[1:]]


@ranks(2, groups_may_stay=True)
def test_monitors_get_the_load_of_experts(tmp_path: Path) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"},
        "steps_per_print": 2,
        "startup_summary": False,
    }
    engine, *_ = ds_engine.initialize(Net(2), config)
    plain = Net(1)
    for step in range(4):
        for rank in range(2):
            x = torch.randn(8, 8, generator=torch.Generator().manual_seed(10 * step + rank))
            if rank == dist.get_rank():
                engine.backward(engine(x))
                engine.step()
            plain(x)
        if step % 2 == 0 or dist.get_rank() != 0:
            continue
        # The same tokens on one process, in the two steps since the last time.
        counters = plain.moe.counters
        assert counters.counts is not None and counters.kept is not None and counters.entropy is not None
        load = [values(tmp_path, f"load_{e}")[-1] for e in range(4)]
        assert load == pytest.approx((counters.counts / 32).tolist())
        assert values(tmp_path, "dropped")[-1] == pytest.approx(1 - counters.kept.item() / 32)
        assert values(tmp_path, "dropped")[-1] > 0
        entropy = values(tmp_path, "entropy")
        assert entropy[-1] == pytest.approx(counters.entropy.item() / 32, rel=1e-5)
        assert entropy[-1] < math.log(4)
        assert len(entropy) == (step + 1) // 2
        counters.clear()
    engine.destroy()
