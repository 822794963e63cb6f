"""Trains a model whose state is three times larger than the memory that this process may use.

    python docs/examples/offload/larger_than_memory.py --nvme-path /local_nvme

The process limits itself (RLIMIT_DATA) to `--limit-mib` more than it needs without a model. First the plan without a
disk is shown, which does not fit. Then the model trains with parameters, masters, gradients and optimizer states on the
disk. `--offload cpu --limit-mib 0` trains the same model in memory, for comparison: the losses have the same bits.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ds_engine
import ds_offload
import ds_zero

WIDTH, HIDDEN = 512, 2048
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
BYTES_PER_ELEMENT = 16
"""fp32 masters, gradients, and two states of Adam."""


class Block(nn.Module):
    """A residual block of 2.1 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, WIDTH) -> the same."""
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def make_model(blocks: int) -> nn.Module:
    """A model of `blocks` blocks."""
    return nn.Sequential(*(Block() for _ in range(blocks)))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--limit-mib", type=int, default=256, help="memory for the model and its training; 0: no limit"
    )
    parser.add_argument("--times", type=float, default=3.0, help="size of the state, in multiples of 256 MiB")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=16, help="samples in a step")
    parser.add_argument("--offload", choices=["cpu", "nvme"], default="nvme")
    parser.add_argument("--overlap-step", action="store_true", help="update parameters during the backward")
    parser.add_argument("--clip", type=float, default=1.0, help="maximum norm of the gradients")
    parser.add_argument(
        "--dtype",
        choices=["bf16", "fp32"],
        default="bf16",
        help="of forward and backward; processors without instructions for bf16 compute much faster in fp32",
    )
    parser.add_argument("--nvme-path", default=tempfile.gettempdir(), help="folder on a disk")
    return parser.parse_args()


def data_bytes() -> int:
    """Bytes of this process that RLIMIT_DATA counts."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmData")))


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the engine."""
    place = {"device": args.offload, **({"nvme_path": args.nvme_path} if args.offload == "nvme" else {})}
    early = {"overlap_step": args.overlap_step}
    return {
        "train_batch_size": args.rows,
        "bf16": {"enabled": args.dtype == "bf16"},
        "gradient_clipping": args.clip,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {**place, **early},
            "offload_param": place if args.offload == "nvme" else {"device": "none"},
        },
        "startup_summary": False,
        "seed": 1,
    }


def plan(args: argparse.Namespace, blocks: int, on_disk: bool) -> ds_zero.Plan:
    """The plan of this training, with all of its state in memory or on a disk."""
    return ds_zero.plan(
        lambda: make_model(blocks),
        torch.empty(args.rows, WIDTH),
        stage=3,
        precision=DTYPES[args.dtype],
        optimizer=ds_offload.CPUAdam,
        disk=("param", "master", "grad", "state") if on_disk else (),
        budget_bytes=args.limit_mib * 2**20 or None,
        device="cpu",
    )


def warm_up(args: argparse.Namespace) -> None:
    """Starts the process group and all threads, whose memory is not that of the model, by training a small one."""
    engine, *_ = ds_engine.initialize(nn.Linear(WIDTH, WIDTH), configuration(args))
    with engine:
        engine.backward(engine(torch.ones(args.rows, WIDTH, dtype=DTYPES[args.dtype])).float().sum())
        engine.step()


def train(args: argparse.Namespace, blocks: int) -> list[float]:
    """Trains, and returns the losses."""
    with ds_zero.deferred_init(stage=3):
        model = make_model(blocks)
    engine, *_ = ds_engine.initialize(model, configuration(args))
    losses, seconds = [], []
    for step in range(args.steps):
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(args.rows, WIDTH, generator=generator).to(DTYPES[args.dtype])
        loss = (engine(x).float() - x.float().flip(1)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
        print(f"step {step + 1}  loss {loss.item()!r}", flush=True)
    # The engine is not destroyed: that would make the model whole in memory, which has no room for it.
    print(f"median step {statistics.median(seconds):.3f} s")
    return losses


def main() -> int:
    """Shows the plans, then trains."""
    args = arguments()
    # Without this, glibc serves also large tensors from its heap, which then has gaps that are as large as tensors.
    if args.limit_mib:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    warm_up(args)
    blocks = max(1, round(args.times * 256 * 2**20 / BYTES_PER_ELEMENT / (2 * WIDTH * HIDDEN)))
    numel = blocks * 2 * WIDTH * HIDDEN
    print(f"{numel:,} parameters; masters, gradients and states: {BYTES_PER_ELEMENT * numel / 2**20:.0f} MiB")
    if args.limit_mib:
        print(f"in memory: {plan(args, blocks, on_disk=False).verdict()[0]}")
        planned = plan(args, blocks, on_disk=True)
        print(f"on a disk: {planned.verdict()[0]}", flush=True)
        limit = data_bytes() + args.limit_mib * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    train(args, blocks)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
