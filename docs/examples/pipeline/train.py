"""A small language model, trained as a pipeline on the sources of Python's standard library.

    torchrun --nproc-per-node 2 train.py
    torchrun --nproc-per-node 4 train.py --schedule zb-v                 # two stages on each rank
    torchrun --nproc-per-node 4 train.py --stages 2                      # 2 pipeline x 2 data-parallel ranks
    python train.py                                                      # the same training in one process

All of them print the same losses, except that data-parallel ranks read more text.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_pipe.draw import html
from ds_pipe.model import LayerSpec, Pipeline, PipelineModule, TiedLayerSpec

VOCAB = 256  # bytes


class Embedding(nn.Embedding):
    """Bytes and their positions."""

    def __init__(self, dim: int, length: int) -> None:
        super().__init__(VOCAB, dim)
        self.positions = nn.Parameter(torch.zeros(length, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.positions[: tokens.shape[1]]


class Block(nn.Module):
    """A decoder block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def head(embedding: nn.Module, x: Tensor) -> Tensor:
    """The output layer: the weights of the embedding."""
    return nn.functional.linear(x, embedding.weight)


def layers(dim: int, depth: int, length: int) -> list[LayerSpec]:
    """The model as a list. Nothing is constructed yet."""
    return [
        TiedLayerSpec("embedding", Embedding, dim, length),
        *[LayerSpec(Block, dim, dim // 16) for _ in range(depth)],
        LayerSpec(nn.LayerNorm, dim),
        TiedLayerSpec("embedding", Embedding, dim, length, forward_fn=head),
    ]


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of the next byte."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def text() -> Tensor:
    """The sources of some packages of the standard library, as bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path for folder in ("json", "email", "asyncio", "logging") for path in (root / folder).rglob("*.py")
    )
    return torch.frombuffer(bytearray(b"\0".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def batches(
    source: Tensor, step: int, data_rank: int, args: argparse.Namespace
) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets) of every micro-batch of one step."""
    generator = torch.Generator().manual_seed(1_000_003 * step + data_rank)
    for _ in range(args.micro_batches):
        starts = torch.randint(len(source) - args.length - 1, (args.batch,), generator=generator)
        rows = source[starts[:, None] + torch.arange(args.length + 1)].long()
        yield rows[:, :-1], rows[:, 1:]


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", type=int, help="pipeline ranks (default: all ranks)")
    parser.add_argument(
        "--schedule", default="1f1b", help="1f1b, gpipe, interleaved, zb-h1, zb-h2, zb-v, dualpipev"
    )
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2, help="sequences in a micro-batch")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--recompute", action="store_true", help="recompute activations in backward")
    parser.add_argument(
        "--timeline", type=Path, help="write the measured timeline of the last step: a .html file"
    )
    return parser.parse_args()


def main() -> None:
    """Trains."""
    args = arguments()
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.set_num_threads(1)  # ranks share the machine
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    module = PipelineModule(
        layers(args.dim, args.depth, args.length),
        args.stages or world,
        loss_fn=loss_fn,
        seed_layers=True,  # the same initial values, whatever the number of stages
        activation_checkpoint_interval=int(args.recompute),
        schedule=args.schedule,
    )
    pipeline = Pipeline(module, args.micro_batches)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    data_rank = rank % (world // module.num_stages)
    source = text()
    for step in range(args.steps):
        measure = args.timeline is not None and step == args.steps - 1
        loss = pipeline.forward_backward(batches(source, step, data_rank, args), measure=measure)
        norm = pipeline.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 10 == 9 or step == args.steps - 1):
            print(f"step {step + 1}: loss {loss:.4f}, gradient norm {norm:.3f}", flush=True)
    if args.timeline is not None:
        spans = pipeline.gathered_spans()
        if rank == 0:
            facts = {"schedule": args.schedule, "micro-batches": str(args.micro_batches)}
            args.timeline.write_text(html(spans, title="Measured timeline of one step", facts=facts))
    pipeline.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
