"""A language model on long sequences, which ranks divide among themselves, in a plain loop."""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import ds_comm
import ds_zero
from ds_layers import (
    AttentionFn,
    RingAttention,
    SequenceBatches,
    SequenceLayout,
    Ulysses,
    linear_cross_entropy,
    mean_over_tokens,
    sdpa,
)


class Block(nn.Module):
    """Attention and an MLP; attention is whatever function has the signature of `AttentionFn`."""

    def __init__(self, dim: int, heads: int, attention: AttentionFn) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, this rank's tokens, dim) -> the same."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.out(self.attention(q, k, v, causal=True, scale=None).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """A decoder over bytes. Positions come with the batch, since each rank has a part of the sequence."""

    def __init__(self, dim: int, depth: int, heads: int, length: int, attention: AttentionFn) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(256, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, attention) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 256, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        """Returns the sum of the losses of this rank's tokens."""
        x = self.embed(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return linear_cross_entropy(self.norm(x), self.head.weight, labels, reduction="sum")


def batches(steps: int, length: int, sample: int, samples: int) -> list[dict[str, Tensor]]:
    """One sequence of each step, from the sources of Python's standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)
    made = []
    for step in range(steps):
        begin = (step * samples + sample) * length % (len(text) - length)
        ids = torch.tensor(list(text[begin : begin + length]), dtype=torch.long)[None]
        made.append({"input_ids": ids, "labels": ids})
    return made


def main() -> None:
    """Trains, and prints losses on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--sequence", type=int, default=0, help="ranks that share a sequence; default: all")
    parser.add_argument("--ring", type=int, default=1, help="how many of them form a ring")
    parser.add_argument("--stage", type=int, default=3)
    options = parser.parse_args()
    world = ds_comm.start()
    size = options.sequence or world.world_size
    mesh = init_device_mesh(
        world.device.type, (world.world_size // size, size), mesh_dim_names=("data", "sequence")
    )
    group = mesh["sequence"].get_group()
    layout = SequenceLayout(
        size=size, ring=options.ring, order="zigzag" if options.ring > 1 else "contiguous"
    )
    attention: AttentionFn = sdpa
    if options.ring == size > 1:
        attention = RingAttention(group, order="zigzag")
    elif options.ring > 1:
        raise SystemExit(
            "this example has rings of all ranks; for both together see SequenceParallelAttention"
        )
    elif size > 1:
        attention = Ulysses(group)
    torch.manual_seed(0)
    model = Model(options.dim, 4, 4, options.length, attention).to(world.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    ds_zero.shard(model, optimizer, stage=options.stage)  # among all ranks: data x sequence
    own = batches(options.steps, options.length, mesh["data"].get_local_rank(), mesh["data"].size())
    for step, batch in enumerate(
        SequenceBatches(own, group, layout=layout, shared=True, device=world.device), 1
    ):
        labels = batch["shift_labels"]
        total = model(batch["input_ids"], batch["position_ids"], labels)
        loss = mean_over_tokens(total, (labels != -100).sum(), group)
        loss.backward()
        norm = ds_zero.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if world.rank == 0 and step % 10 == 0:
            print(f"step {step}: loss {loss.item():.4f}, gradient norm {float(norm):.3f}", flush=True)
    ds_zero.destroy(model)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
