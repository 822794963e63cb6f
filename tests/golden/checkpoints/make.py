"""Writes one of the checkpoints here. See README.md for the commands and for the version that wrote them.

torchrun --nproc-per-node RANKS make.py plain|experts|parts
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import ds_engine
import ds_zero
from ds_checkpoint.format.manifest import VERSION
from ds_engine.checkpoint import Content, write

HERE = Path(__file__).parent / f"version{VERSION}"
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
    "zero_optimization": {"stage": 2},
    "startup_summary": False,
}


class Plain(nn.Module):
    """Sizes that no number of ranks divides, a shared weight, a frozen one and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(torch.randn(5, 3, generator=generator))
        self.second = nn.Parameter(torch.randn(3, 5, generator=generator))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.arange(7.0), requires_grad=False)
        self.register_buffer("seen", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first @ self.second * self.scale).square().mean() + self.frozen.sum()


class Experts(nn.Module):
    """A dense weight that all ranks hold alike, and an expert of which each expert-parallel rank has its own."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.dense = nn.Parameter(torch.arange(6.0))
        self.expert = nn.Parameter(torch.full((5,), float(index)))


class Part(nn.Module):
    """Half of the rows of a weight, under the same name on both model-parallel ranks; the second has one more."""

    def __init__(self, index: int) -> None:
        super().__init__()
        whole = torch.randn(8, 6, generator=torch.Generator().manual_seed(5))
        self.weight = nn.Parameter(whole[4 * index : 4 * index + 4].clone())
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.alike = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(2) + index)
        if index:
            self.head = nn.Parameter(torch.arange(5.0))

    def forward(self, x: Tensor) -> Tensor:
        extra = self.head.square().sum() if hasattr(self, "head") else 0.0
        return (x @ self.weight.T).square().mean() + (self.alike * x[0, :3]).sum() + extra


class Mpu:
    """Two model-parallel ranks side by side; what is left is data parallel."""

    def __init__(self) -> None:
        shape = (dist.get_world_size() // 2, 2)
        self.mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "model"))

    def get_data_parallel_group(self) -> Any:
        return self.mesh["data"].get_group()

    def get_data_parallel_rank(self) -> int:
        return self.mesh["data"].get_local_rank()

    def get_data_parallel_world_size(self) -> int:
        return self.mesh["data"].size()

    def get_model_parallel_group(self) -> Any:
        return self.mesh["model"].get_group()

    def get_model_parallel_rank(self) -> int:
        return self.mesh["model"].get_local_rank()

    def get_model_parallel_world_size(self) -> int:
        return 2


def step(engine: ds_engine.Engine, width: int) -> None:
    """One step on the same batch on every rank, so that the number of data-parallel ranks does not matter."""
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(engine.global_steps))
    engine.backward(engine(x))
    engine.step()


def make_engine(model: nn.Module, mpu: Mpu | None = None) -> ds_engine.Engine:
    engine, *_ = ds_engine.initialize(model=model, config=CONFIG, mpu=mpu)
    return engine


def make_experts(*, filled: bool) -> tuple[nn.Module, torch.optim.Optimizer, int]:
    """Two expert-parallel ranks; the others hold the same experts."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "expert"))
    index = mesh["expert"].get_local_rank()
    model = Experts(index if filled else 9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True)
    config = ds_zero.ZeroConfig(persistence_threshold_numel=0)
    own = mesh["data"]
    ds_zero.shard(
        model, optimizer, 2, config=config, mesh_for=lambda name, _: own if name == "expert" else None
    )
    if filled:
        (model.dense.sum() * 2 + (model.expert * (index + 1)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, index


def values(model: nn.Module) -> dict[str, list[float]]:
    """Every parameter, buffer and moment, whole, by name."""
    facts = {f"{name}/param": value for name, value in ds_zero.full_state_dict(model).items()}
    for name, param in model.named_parameters():
        if param.requires_grad:
            for state in ("exp_avg", "exp_avg_sq"):
                facts[f"{name}/{state}"] = ds_zero.get_full(model, name, state)
    return {name: value.double().flatten().tolist() for name, value in facts.items()}


def main(kind: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    folder, part = HERE / kind, 0
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "experts":
        model, optimizer, part = make_experts(filled=True)
        write(folder, "saved", lambda: Content(records=ds_zero.records(model, optimizer)))
        facts = {"saved": values(model)}
    else:
        mpu = Mpu() if kind == "parts" else None
        part = mpu.get_model_parallel_rank() if mpu else 0
        width = 5 if kind == "plain" else 6
        engine = make_engine(Plain() if mpu is None else Part(part), mpu)
        for _ in range(2):
            step(engine, width)
        engine.save_checkpoint(folder, tag="saved", client_state={"n": 7, "table": torch.arange(4)})
        facts = {"saved": values(engine.module)}
        step(engine, width)
        facts["after"] = values(engine.module)
    if dist.get_rank() < (1 if kind == "plain" else 2):
        (folder / f"facts{part}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
