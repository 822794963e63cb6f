"""Training over a slow network, in four ways: one bit of each momentum, or FSDP2 and DDP with fewer bytes."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import ds_comm
from ds_comm.exchange import CompressedHook, QuantizedAllGather, QuantizedReduceScatter
from ds_comm.optim import OneBitAdam, ZeroOneAdam

CONTEXT = 16
"""Bytes that the model sees to predict the next one."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--how", choices=["onebit", "zeroone", "fsdp2", "ddp", "plain"], default="onebit")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--freeze-step", type=int, default=40, help="steps at full precision")
    parser.add_argument(
        "--text", type=Path, default=Path(__file__), help="the file to learn (default: this script)"
    )
    parser.add_argument("--batch", type=int, default=32, help="samples per step and rank")
    parser.add_argument("--dim", type=int, default=256)
    return parser.parse_args()


def make_model(dim: int) -> nn.Module:
    """A small byte-level language model."""
    layers = [nn.Embedding(256, dim // 4), nn.Flatten(), nn.Linear(CONTEXT * dim // 4, dim), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 256))


def batch_of(text: Tensor, step: int, size: int, rank: int) -> tuple[Tensor, Tensor]:
    """This rank's samples of a step."""
    draw = torch.Generator().manual_seed(1000 * step + rank)
    starts = torch.randint(len(text) - CONTEXT, (size,), generator=draw)
    windows = torch.stack([text[i : i + CONTEXT + 1] for i in starts])
    return windows[:, :-1], windows[:, -1]


def prepared(how: str, model: nn.Module, freeze_step: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer."""
    if how == "onebit":  # no DDP: the optimizer reduces
        return model, OneBitAdam(model.parameters(), lr=3e-3, freeze_step=freeze_step)
    if how == "zeroone":
        return model, ZeroOneAdam(
            model.parameters(), lr=3e-3, var_freeze_step=freeze_step, local_step_scaler=40
        )
    if how == "fsdp2":  # weights in 8 bits, gradients in 4
        fully_shard(model)
        assert isinstance(model, FSDPModule)
        model.set_custom_all_gather(QuantizedAllGather())
        model.set_custom_reduce_scatter(QuantizedReduceScatter())
        return model, torch.optim.AdamW(model.parameters(), lr=3e-3)
    wrapped = DistributedDataParallel(model)
    if how == "ddp":  # gradients of one bit
        wrapped.register_comm_hook(CompressedHook(start_step=freeze_step), CompressedHook.reduce)
    return wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    """Trains; every rank runs it."""
    args = arguments()
    world = ds_comm.start()
    torch.manual_seed(0)
    text = torch.tensor(list(args.text.read_bytes()))
    model, optimizer = prepared(args.how, make_model(args.dim).to(world.device), args.freeze_step)
    for step in range(1, args.steps + 1):
        inputs, targets = batch_of(text, step, args.batch, world.rank)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs.to(world.device)), targets.to(world.device))
        loss.backward()
        optimizer.step()
        if world.rank == 0 and (step % 20 == 0 or step == args.steps):
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    if isinstance(optimizer, OneBitAdam) and world.rank == 0:
        sent, compressed = optimizer.traffic, optimizer.compressed_state.wire_bytes
        print(f"sent {sent.num_bytes} bytes, {compressed} of them in each compressed step")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
