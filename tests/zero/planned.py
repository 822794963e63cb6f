"""One training job twice: as `ds_zero.plan` predicts it, and counted while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import ds_comm
import ds_zero
from ds_core import arena
from ds_offload import HostStore
from ds_zero.predict.measured_memory import counted_memory

VOCABULARY, TOKENS = 512, 64


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (h.view(b, t, 4, d // 4).transpose(1, 2) for h in self.qkv(self.first(x)).chunk(3, -1))
        x = x + self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        )
        return x + self.down(F.gelu(self.up(self.second(x))))


class Gpt(nn.Module):
    """A transformer of about a million parameters; activations weigh as much as states."""

    def __init__(
        self, dim: int = 128, layers: int = 4, *, tied: bool = False, recompute: bool = False
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, dim), nn.Embedding(TOKENS, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.recompute = recompute

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def is_expert(name: str) -> bool:
    """Whether a parameter of `Gpt` is of the part that takes the place of experts."""
    return ".up." in name or ".down." in name


@dataclass(frozen=True, kw_only=True)
class Job:
    stage: int
    precision: torch.dtype | None = None
    accumulation: str | None = None
    steps: int = 1
    host: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    clip: bool = True
    batch: int = 4
    config: Mapping[str, Any] = field(default_factory=dict)
    scaled: bool = False
    shard_ranks: int | None = None
    """On 4 ranks."""
    expert_ranks: int | None = None
    """On 4 ranks: how many hold the same feed-forward layers."""

    def zero_config(self) -> ds_zero.ZeroConfig:
        return ds_zero.ZeroConfig(
            accumulation=self.accumulation,  # type: ignore[arg-type]
            accumulation_steps=self.steps,
            param_dtype=self.precision,
            **self.config,
        )

    def inputs(self) -> tuple[Tensor, Tensor]:
        data = torch.randint(VOCABULARY, (self.batch, TOKENS + 1))
        return data[:, :-1].contiguous(), data[:, 1:].contiguous()

    def plan(self, ranks: int, **options: Any) -> ds_zero.Plan:
        with torch.device("meta"):
            model = Gpt(**self.model)
        given: dict[str, Any] = {
            "stage": self.stage,
            "ranks": ranks,
            "optimizer": self.optimizer,
            "config": self.zero_config(),
            "accumulation_steps": self.steps,
            "offload": self.host,
            "clip": self.clip,
            "loss_scale": self.scaled,
            "shard_ranks": self.shard_ranks,
            "ranks_for": (lambda name, _: self.expert_ranks if is_expert(name) else None)
            if self.expert_ranks
            else None,
            "device": "cpu",
            "deferred": False,
        }
        return ds_zero.plan(model, self.inputs(), **given | options)

    def meshes(self) -> dict[str, Any]:
        """Arguments of `shard`."""
        if self.shard_ranks is not None:
            return {"mesh": init_device_mesh("cpu", (4 // self.shard_ranks, self.shard_ranks))}
        if self.expert_ranks is not None:
            names = ("experts", "data")
            mesh = init_device_mesh("cpu", (4 // self.expert_ranks, self.expert_ranks), mesh_dim_names=names)
            return {"mesh_for": lambda name, _: mesh["data"] if is_expert(name) else None}
        return {}

    def count(self, steps: int = 2) -> counted_memory:
        """Train for real; every phase under its name."""
        inputs = self.inputs()
        meshes = self.meshes()
        with counted_memory(lambda: arena.stats().in_use_bytes) as counted:
            model = Gpt(**self.model)
            optimizer = self.optimizer(model.parameters())
            counted.mark("load")
            store = HostStore() if self.host else None
            config = self.zero_config()
            comm = ds_comm.collectives()  # without it, one bucket more may wait until its messages are sent
            ds_zero.shard(model, optimizer, self.stage, config=config, store=store, comm=comm, **meshes)
            scaler = ds_zero.LossScaler(model) if self.scaled else None
            for _ in range(steps):
                for _ in range(self.steps):
                    counted.mark("forward")
                    loss = model(*inputs) / self.steps
                    counted.mark("backward")
                    (loss if scaler is None else scaler.scale(loss)).backward()
                    del loss
                counted.mark("step")
                if self.clip:
                    ds_zero.clip_grad_norm_(model, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            counted.mark("save")
            ds_zero.records(model, optimizer)
        return counted
