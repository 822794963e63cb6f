"""A small language model with mixtures of experts, trained on the sources of Python's standard library.

    python train.py                                             # all experts in one process
    torchrun --nproc-per-node 2 train.py --ep 2                 # the experts divided among 2 ranks
    torchrun --nproc-per-node 4 train.py --ep 2 --stage 3       # 2 x 2 ranks, parameters sharded too
    torchrun --nproc-per-node 2 train.py --ep 1 --load FOLDER   # goes on from a checkpoint of another size

All ranks together read the same text whatever their number, so all of these print nearly the same losses.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_checkpoint
import ds_moe
import ds_zero

VOCAB = 256  # bytes


class Block(nn.Module):
    """A decoder block with a mixture of experts in place of the feed-forward network."""

    def __init__(self, dim: int, heads: int, experts: int, k: int, ep: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.moe = ds_moe.MoE(
            dim,
            lambda: ds_moe.FeedForward(dim, 2 * dim),
            num_experts=experts,
            ep_size=ep,
            k=k,
            drop_tokens=False,
            top2_2nd_expert_sampling=False,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        routed, aux_loss, _ = self.moe(self.norm2(x))
        return x + routed, aux_loss


class Model(nn.Module):
    """Bytes in, the loss of the next byte and the balance loss out."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, args.dim)
        self.positions = nn.Embedding(args.length, args.dim)
        self.blocks = nn.ModuleList(
            Block(args.dim, args.dim // 16, args.experts, args.k, args.ep) for _ in range(args.depth)
        )
        self.norm, self.head = nn.LayerNorm(args.dim), nn.Linear(args.dim, VOCAB)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets = rows[:, :-1], rows[:, 1:]
        x = self.embedding(inputs) + self.positions(torch.arange(inputs.shape[1]))
        aux = x.new_zeros(())
        for block in self.blocks:
            x, own = block(x)
            aux = aux + own
        loss = nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())
        return loss, aux / len(self.blocks)


def text() -> Tensor:
    """The sources of some packages of the standard library, as bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path for folder in ("json", "email", "asyncio", "logging") for path in (root / folder).rglob("*.py")
    )
    return torch.frombuffer(bytearray(b"\0".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def batch(source: Tensor, step: int, args: argparse.Namespace, rank: int, world: int) -> Tensor:
    """This rank's rows of the step's batch."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(source) - args.length - 1, (args.batch,), generator=generator)
    rows = source[starts[:, None] + torch.arange(args.length + 1)].long()
    return rows[rank::world]


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ep", type=int, default=1, help="ranks among which experts are divided")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--k", type=int, default=2, help="experts for each token")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="sequences of all ranks together")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save", type=Path, help="folder of the checkpoint after the last step")
    parser.add_argument("--load", type=Path, help="folder of a checkpoint to go on from")
    return parser.parse_args()


def main() -> None:
    """Trains."""
    args = arguments()
    dist.init_process_group("gloo") if "RANK" in os.environ and not dist.is_initialized() else None
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    model = Model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=True)
    ds_zero.shard(model, optimizer, args.stage, mesh_for=ds_moe.expert_mesh(model))
    progress = {"step": 0}
    if args.load:
        ds_checkpoint.load(args.load, model, optimizer, progress)
    source = text()
    first = progress["step"]
    for step in range(first + 1, first + args.steps + 1):
        loss, aux = model(batch(source, step, args, rank, world))
        (loss + 0.01 * aux).backward()
        norm = ds_zero.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            mean = loss.detach().clone()
            if world > 1:
                dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step}: loss {mean / world:.4f}, gradient norm {norm:.3f}", flush=True)
    for report in ds_moe.reports(model):
        if rank == 0:
            print(report)
    progress["step"] = first + args.steps
    if args.save:
        ds_checkpoint.save(args.save, model, optimizer, progress)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
