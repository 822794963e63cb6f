"""Optimizer states on a disk in a plain PyTorch loop, alone or with a model that FSDP2 has sharded.

    python docs/examples/offload/plain_loop.py --folder /local_nvme
    torchrun --nproc-per-node 2 docs/examples/offload/plain_loop.py --folder /local_nvme   # FSDP2

Only ds-offload and its dependencies are needed. The states of Adam take twice the memory of the parameters; here four
pages of 1 MiB of them are in memory at a time.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import ds_offload


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="folder on a disk")
    parser.add_argument("--steps", type=int, default=20)
    return parser.parse_args()


def main() -> None:
    """Learns to reverse vectors."""
    args = arguments()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
    if ranks > 1:
        dist.init_process_group("gloo")
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(model)
    optimizer = ds_offload.PagedOptimizer(
        ds_offload.CPUAdam(model.parameters(), lr=2e-3), args.folder, page_bytes=1 << 20, num_buffers=4
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    rank = dist.get_rank() if ranks > 1 else 0
    for step in range(args.steps):
        generator = torch.Generator().manual_seed(step * ranks + rank)
        x = torch.randn(64, 256, generator=generator)
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if rank == 0:
            print(f"step {step + 1}  loss {loss.item():.4f}")
    if rank == 0:
        print(
            f"states on the disk: {optimizer.state_bytes / 2**20:.1f} MiB, "
            f"in memory: {optimizer.buffer_bytes / 2**20:.1f} MiB"
        )
    optimizer.close()
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
