"""How long a sequence may be in the memory that plain checkpointed training needs for a short one.

    python memory.py [--tokens 512] [--factor 8] [--folder FOLDER]

"plain": layers are recomputed in backward (`torch.utils.checkpoint`), logits are whole. "tiled": MLPs and the loss run
in parts of the sequence, and the inputs of layers are on a disk until backward. Memory: torch's allocations in a step,
counted event by event, with the buffers of the disk; and what `ds_zero.plan` predicts. Then both train in processes
whose data segment (RLIMIT_DATA) may grow by what "plain" needed for the short sequence, and a margin.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import ds_zero
from ds_core import arena
from ds_layers import linear_cross_entropy, sdpa, tiled_over_sequence
from ds_offload import ActivationOffload, ActivationOptions, PlannedActivationOffload
from ds_zero.predict.measured_memory import counted_memory

DIM, HEADS, DEPTH, VOCABULARY = 128, 4, 8, 8192
PART, LOSS_PART = 512, 64
"""Tokens of a tile of an MLP, and of a tile of the logits, which are 16 times as wide."""
CONFIG = ds_zero.ZeroConfig(accumulation_steps=1)
MARGIN = 64 << 20
"""Bytes that a process may use besides: torch's own, stacks of threads, the C library's free lists."""


class Block(nn.Module):
    """Attention and an MLP."""

    def __init__(self, tiled: bool) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
        self.tiled = tiled

    def forward(self, x: Tensor) -> Tensor:
        """(1, tokens, dim) -> the same."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        x = x + self.out(sdpa(q, k, v, causal=True, scale=None).flatten(2))
        if not self.tiled:
            return x + self.mlp(self.norm2(x))
        return tiled_over_sequence(
            lambda part: part + self.mlp(self.norm2(part)), x, max(1, x.shape[1] // PART)
        )


class Model(nn.Module):
    """A decoder whose forward returns the loss."""

    def __init__(self, tiled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.blocks = nn.ModuleList(Block(tiled) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)
        self.tiled = tiled

    def forward(self, tokens: Tensor) -> Tensor:
        """(1, tokens + 1) -> the mean loss."""
        x = self.embed(tokens[:, :-1])
        for block in self.blocks:
            # Reentrant: inputs of layers are saved tensors, which can be moved.
            x = checkpoint(block, x, use_reentrant=True)
        x, labels = self.norm(x), tokens[:, 1:]
        if self.tiled:
            return linear_cross_entropy(x, self.head.weight, labels, part_tokens=LOSS_PART)
        return cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def text(tokens: int) -> Tensor:
    """A sequence."""
    return torch.randint(0, VOCABULARY, (1, tokens + 1), generator=torch.Generator().manual_seed(1))


def options(folder: str) -> ActivationOptions:
    """Inputs of layers go to the disk through few buffers."""
    return ActivationOptions(device="nvme", nvme_path=folder, max_host_bytes=4 << 20, prefetch_bytes=0)


def step(way: str, tokens: int, folder: str, counted: Any = None) -> dict[str, Any]:
    """Trains two steps; returns the last loss, and what was moved."""
    model = Model(way == "tiled")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, stage=0, config=CONFIG)
    offload = ActivationOffload(options(folder)) if way == "tiled" else None
    if offload is not None:
        offload.attach(model)
    batch, loss = text(tokens), torch.zeros(())
    for _ in range(2):
        if counted is not None:
            counted.mark("step")
        loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = offload.statistics.moved_bytes if offload is not None else 0
    if offload is not None:
        offload.close()
    ds_zero.destroy(model)
    return {"loss": loss.item(), "moved": moved}


def counted_step(way: str, tokens: int, folder: str) -> tuple[int, dict[str, Any]]:
    """Returns the peak of torch's and ds_core's memory in bytes, and what `step` does."""
    counted = counted_memory(native_bytes=lambda: arena.stats().in_use_bytes)
    with counted:
        result = step(way, tokens, folder, counted)
    return counted.phase_bytes["step"], result


def planned(way: str, tokens: int, folder: str) -> int:
    """Returns the peak that `ds_zero.plan` predicts, in bytes."""
    activations = PlannedActivationOffload(options(folder)) if way == "tiled" else None
    plan = ds_zero.plan(
        lambda: Model(way == "tiled"),
        (text(tokens),),
        stage=0,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        config=CONFIG,
        device="cpu",
        activations=activations,
    )
    return max(plan.phase(phase).device_bytes for phase in ("forward", "backward", "step"))


def data_bytes() -> int:
    """Size of this process's data segment."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmData"))
    return int(line.split()[1]) << 10


def limited(way: str, tokens: int, limit: int, folder: str) -> str:
    """Trains in a process that may allocate `limit` bytes; returns how it ended."""
    command = [sys.executable, __file__, "--child", json.dumps([way, tokens, limit, folder])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    if done.returncode == 0:
        return done.stdout.strip().splitlines()[-1]
    last = (done.stderr.strip().splitlines() or ["killed"])[-1]
    return f"out of memory: {last[:90]}"


def child(arguments: str) -> None:
    """Trains under a limit."""
    way, tokens, limit, folder = json.loads(arguments)
    step(way, 64, folder)  # what is loaded once: kernels, threads
    before = data_bytes()
    resource.setrlimit(resource.RLIMIT_DATA, (before + limit, before + limit))
    print(f"trained, loss {step(way, tokens, folder)['loss']:.4f}")


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--factor", type=int, default=8)
    parser.add_argument("--folder", help="on the disk that is used. Default: a temporary one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        child(args.child)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print("| way | tokens | counted | planned | on disk | loss |\n|---|---|---|---|---|---|")
        peaks = {}
        for way, tokens in (("plain", args.tokens), ("tiled", args.factor * args.tokens)):
            peaks[way, tokens], result = counted_step(way, tokens, folder)
            sizes = (peaks[way, tokens], planned(way, tokens, folder), result["moved"])
            cells = " | ".join(f"{size / 2**20:.1f} MiB" for size in sizes)
            print(f"| {way} | {tokens} | {cells} | {result['loss']:.5f} |", flush=True)
        limit = peaks["plain", args.tokens] + MARGIN
        print(f"\nIn a process that may allocate {limit / 2**20:.0f} MiB:\n")
        for way, tokens in (
            ("plain", args.tokens),
            ("plain", args.factor * args.tokens),
            ("tiled", args.factor * args.tokens),
        ):
            print(f"* {way}, {tokens} tokens: {limited(way, tokens, limit, folder)}", flush=True)


if __name__ == "__main__":
    main()
