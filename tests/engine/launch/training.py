"""A short training on 4 ranks, for ranks that a launcher starts and for those of the tests' own pool."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

import ds_comm
import ds_engine
from ds_comm.same_host import peer_memory
from ds_zero.comm.abort import AbortFlag


def train(steps: int = 5) -> str:
    """Returns the losses of this rank, with all their bits."""
    rank = ds_comm.start().rank
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.GELU(), torch.nn.Linear(33, 1))
    config = {
        "train_batch_size": 16,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": 3},
        "startup_summary": False,
    }
    engine, *_ = ds_engine.initialize(model=model, config=config)
    losses = []
    for step in range(steps):
        batch = torch.randn(16, 16, generator=torch.Generator().manual_seed(step))
        loss = engine(batch[rank * 4 : rank * 4 + 4]).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item().hex())
    return " ".join(losses)


def peers() -> str:
    """Returns the ranks whose memory this rank can read."""
    ds_comm.start()
    group = dist.group.WORLD
    assert group is not None
    memory = peer_memory.connect(group, torch.device("cpu"), AbortFlag())
    if memory is None:
        return "none"
    return " ".join(str(rank) for rank in range(int(os.environ["WORLD_SIZE"])) if memory.knows(rank))
