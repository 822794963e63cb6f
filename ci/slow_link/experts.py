"""What a rank of `ci/bench moe --wire` does: trains a small model of experts with ZeRO-3, its experts divided or not.

    PYTHONPATH=ci python -m slow_link.experts SYSTEM JSON

Ranks are those of the environment. The first rank prints "RESULT " and JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_comm
import ds_moe
import ds_zero
from ds_comm.exchange import PlainAllToAll, QuantizedAllToAll
from slow_link.hosts import HEADERS, sent

LABELS = {
    "zero3": "ZeRO-3, experts gathered",
    "experts": "ZeRO-3, experts divided",
    "experts8": "the same, tokens in 8 bits",
}
WARM = 2
"""Steps before those that are measured."""


class Model(nn.Module):
    """Blocks of a dense layer and a mixture of experts."""

    def __init__(self, hidden: int, layers: int, experts: int, ep_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.experts = nn.ModuleList(
            ds_moe.MoE(
                hidden,
                lambda: ds_moe.FeedForward(hidden, 4 * hidden),
                experts,
                ep_size,
                k=2,
                drop_tokens=False,
                top2_2nd_expert_sampling=False,
            )
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The loss of tokens (T, H)."""
        aux = x.new_zeros(())
        for dense, experts in zip(self.dense, self.experts, strict=True):
            out, own, _ = experts(torch.tanh(dense(x)))
            x, aux = x + out, aux + own
        return x.square().mean() + 0.01 * aux


def measured(system: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds and bytes of a step on this rank, and the last loss over all ranks."""
    world = ds_comm.start()
    ep_size = 1 if system == "zero3" else world.world_size
    model = Model(settings["hidden"], settings["layers"], settings["experts"], ep_size)
    exchange = QuantizedAllToAll(8) if system == "experts8" else PlainAllToAll()
    mesh_for = ds_moe.expert_mesh(model, all_to_all=exchange)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    numel = sum(p.numel() for p in model.parameters())
    ds_zero.shard(model, optimizer, 3, mesh_for=mesh_for)
    times, loss = [], torch.zeros(())
    before = (0, 0)
    for step in range(WARM + settings["steps"]):
        if step == WARM:
            dist.barrier()
            before = sent()
        generator = torch.Generator().manual_seed(100 * step + world.rank)
        x = torch.randn(settings["tokens"], settings["hidden"], generator=generator)
        begin = time.perf_counter()
        loss = model(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begin)
    dist.barrier()
    after = sent()
    payload = after[0] - before[0] - HEADERS * (after[1] - before[1])
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return {
        "numel": numel,
        "seconds": sorted(times[WARM:])[len(times[WARM:]) // 2],
        "payload": payload / settings["steps"],
        "loss": mean.item() / world.world_size,
    }


def main() -> None:
    """Measures one system."""
    system, settings = sys.argv[1], json.loads(sys.argv[2])
    result = measured(system, settings)
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
