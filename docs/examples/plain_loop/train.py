"""ZeRO in a plain PyTorch loop, with checkpoints: a run that is started again continues, on any number of ranks."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import ds_checkpoint
import ds_comm
import ds_zero

CONTEXT = 16
"""Bytes that the model sees to predict the next one."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--stage", type=int, default=3, help="ZeRO stage, 0 to 3; may differ from the checkpoint's"
    )
    parser.add_argument("--steps", type=int, default=200, help="stop after this step")
    parser.add_argument("--save-every", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument(
        "--text", type=Path, default=Path(__file__), help="the file to learn (default: this script)"
    )
    parser.add_argument("--batch", type=int, default=32, help="samples per step over all ranks")
    parser.add_argument("--dim", type=int, default=256)
    return parser.parse_args()


def make_model(dim: int) -> nn.Module:
    """A small byte-level language model."""
    layers = [nn.Embedding(256, dim // 4), nn.Flatten(), nn.Linear(CONTEXT * dim // 4, dim), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 256))


def batch_of(text: Tensor, step: int, size: int, rank: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    """This rank's samples of a step. They depend on the step's number alone, so the data need no state of their own."""
    draw = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - CONTEXT, (size,), generator=draw)[rank::num_ranks]
    windows = torch.stack([text[i : i + CONTEXT + 1] for i in starts])
    return windows[:, :-1], windows[:, -1]


def main() -> None:
    """Trains; every rank runs it."""
    args = arguments()
    world = ds_comm.start()
    torch.manual_seed(0)
    text = torch.tensor(list(args.text.read_bytes()))
    model = make_model(args.dim).to(world.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=20)
    model, optimizer = ds_zero.shard(model, optimizer, stage=args.stage, comm=ds_comm.collectives())

    progress = {"step": 0, "schedule": schedule}  # what else a checkpoint has to contain
    if ds_checkpoint.latest(args.checkpoints) is not None:
        ds_checkpoint.load(args.checkpoints, model, optimizer, progress)
        if world.rank == 0:
            print(f"continuing after step {progress['step']}")

    while progress["step"] < args.steps:
        progress["step"] += 1
        inputs, targets = batch_of(text, progress["step"], args.batch, world.rank, world.world_size)
        logits = model(inputs.to(world.device))
        loss = nn.functional.cross_entropy(logits, targets.to(world.device))
        loss.backward()
        ds_zero.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if world.rank == 0:
            print(f"step {progress['step']}: loss {loss.item():.6f}")
        if progress["step"] % args.save_every == 0 or progress["step"] == args.steps:
            ds_checkpoint.save(args.checkpoints, model, optimizer, progress, keep_last=2)

    ds_zero.destroy(model)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
