"""What checksums of shards cost.  Run it with `ci/bench checksums [--write]`.

Kernels: Adam without checksums, with checksums in its pass, and with passes of their own before and after it. Training:
the same model twice in each process, sharded with and without checksums, which step in turn. All contenders are
interleaved, from a rotating start; a figure is the ratio of the medians of their rounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import ds_zero
from ds_core import arena, kernels
from ds_core.optim import FusedAdam
from ds_offload import CPUAdam, HostStore

WIDTH, LAYERS, TOKENS, RANKS = 512, 6, 256, 2
Step = Callable[[], object]


def shown(line: str) -> str:
    """Prints a line at once: the whole takes minutes."""
    print(line, flush=True)
    return line


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each step."""
    names = list(steps)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            begin = time.perf_counter()
            steps[name]()
            if i:  # the first round fills caches
                taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in taken.items()}


# --- kernels


def kernel_steps(numel: int, grad_dtype: torch.dtype) -> dict[str, Step]:
    param, mean, square, grad = (arena.empty(numel, torch.float32).normal_() for _ in range(4))
    square.abs_()
    grad = grad.to(grad_dtype)
    read = torch.zeros(4, kernels.num_checksums(numel), dtype=torch.int64)
    written = torch.zeros_like(read)
    options: dict[str, Any] = {
        "step": 3,
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.01,
    }

    def adam(**more: Any) -> None:
        kernels.adam_step([param], [mean], [square], [grad], **options, **more)

    def apart() -> None:
        kernels.checksums([grad, param, mean, square], list(read))
        adam()
        kernels.checksums([param, mean, square], list(written[1:]))

    def by_crc32c() -> None:
        tensors: list[Tensor] = [grad, param, mean, square]
        for tensor in tensors:
            kernels.crc32c(tensor)
        adam()
        for tensor in tensors[1:]:
            kernels.crc32c(tensor)

    return {
        "without": adam,
        "in its pass": lambda: adam(checksums=([read], [written])),
        "passes of their own": apart,
        "CRC-32C, passes of their own": by_crc32c,
    }


def kernel_table() -> list[str]:
    lines = [
        "| threads | parameters | gradient | without, ns per parameter | in its pass | passes of their own | "
        "CRC-32C, passes of their own |",
        "|---|---|---|---|---|---|---|",
    ]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for numel, rounds in ((1 << 17, 100), (20_000_000, 9)):
            for dtype in (torch.float32, torch.bfloat16):
                found = interleaved(kernel_steps(numel, dtype), rounds)
                base = found.pop("without")
                ratios = " | ".join(f"x {seconds / base:.2f}" for seconds in found.values())
                lines.append(
                    shown(
                        f"| {threads} | {numel:,} | {str(dtype)[6:]} | {base / numel * 1e9:.2f} | {ratios} |"
                    )
                )
    return lines


# --- training


def transformer() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)


JOBS: dict[str, dict[str, Any]] = {
    "stage 0, FusedAdam": {"stage": 0, "optimizer": FusedAdam},
    "stage 2, FusedAdam": {"stage": 2, "optimizer": FusedAdam},
    "stage 3, FusedAdam": {"stage": 3, "optimizer": FusedAdam},
    "stage 2, HostStore and CPUAdam": {"stage": 2, "optimizer": CPUAdam, "host": True},
    "stage 2, torch.optim.AdamW": {"stage": 2, "optimizer": torch.optim.AdamW},
}


class Training:
    """One sharded model."""

    def __init__(self, job: dict[str, Any], *, checksums: bool) -> None:
        self.model = transformer()
        self.optimizer = job["optimizer"](self.model.parameters(), lr=1e-4)
        ds_zero.shard(
            self.model,
            self.optimizer,
            job["stage"],
            config=ds_zero.ZeroConfig(checksums=checksums),
            store=HostStore() if job.get("host") else None,
        )
        self.x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))

    def backward(self) -> None:
        self.model(self.x).square().mean().backward()

    def step(self) -> None:
        ds_zero.clip_grad_norm_(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def train(rank: int, name: str, rounds: int, port: int, queue: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    pair = {on: Training(JOBS[name], checksums=on) for on in (False, True)}
    parts: dict[bool, dict[str, list[float]]] = {on: {"backward": [], "step": []} for on in pair}
    for i in range(rounds + 2):
        for on in (False, True) if i % 2 else (True, False):
            dist.barrier()
            begin = time.perf_counter()
            pair[on].backward()
            middle = time.perf_counter()
            pair[on].step()
            end = time.perf_counter()
            if i > 1:
                parts[on]["backward"].append(middle - begin)
                parts[on]["step"].append(end - middle)
    same = all(
        torch.equal(a, b)
        for a, b in zip(*(ds_zero.full_state_dict(t.model).values() for t in pair.values()), strict=True)
    )
    if rank == 0:
        queue.put((same, parts))
    dist.barrier()
    dist.destroy_process_group()


def training_table(rounds: int) -> list[str]:
    lines = [
        "| job | step and backward, without | with checksums | of these: clipping and step, without | with checksums |",
        "|---|---|---|---|---|",
    ]
    for index, name in enumerate(JOBS):
        queue = mp.get_context("spawn").SimpleQueue()
        mp.spawn(train, (name, rounds, 29700 + index, queue), nprocs=RANKS)
        same, parts = queue.get()
        assert same, f"{name}: checksums changed bits"
        whole = {on: statistics.median(map(sum, zip(*p.values(), strict=True))) for on, p in parts.items()}
        steps = {on: statistics.median(p["step"]) for on, p in parts.items()}
        line = (
            f"| {name} | {whole[False] * 1e3:.0f} ms | x {whole[True] / whole[False]:.3f} | "
            f"{steps[False] * 1e3:.1f} ms | x {steps[True] / steps[False]:.2f} |"
        )
        lines.append(shown(line))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument(
        "--write", action="store_true", help="replace the tables of docs/benchmarks/checksums.md"
    )
    args = parser.parse_args()
    where = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    tables = [f"Machine: {where}.", "", *kernel_table(), "", *training_table(args.rounds)]
    if args.write:
        page = Path(__file__).parent.parent / "docs" / "benchmarks" / "checksums.md"
        text = page.read_text()
        head = text[: text.index("Machine:")]
        page.write_text(head + "\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
