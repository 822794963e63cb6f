"""Validation loss after as many steps with and without compression: the same model, batches and schedule in each run.

    ci/bench converge [--steps 1000] [--seeds 0,1,2] [--systems adam,onebit,...] [--budget-s 280]

Two ranks (gloo, one thread each) train a byte-level transformer of 0.13 M parameters on the sources of Python's
standard library, 2 x 8 x 64 bytes a step. A seed gives the model's first values and the order of the batches. Every run
takes about a minute; its result is kept in --folder, one file each, and not measured again. With --budget-s no run
begins after that many seconds: call the command again until the table is full.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ds_comm
import ds_zero
from ds_comm.compress import TopKCompressor
from ds_comm.exchange import LoCoReduceScatter, QuantizedAllGather, QuantizedReduceScatter
from ds_comm.optim import (
    CompressionOptions,
    LocalSGD,
    OneBitAdam,
    OneBitLamb,
    ShardedOneBitAdam,
    ShardedOneBitLamb,
    ZeroOneAdam,
    nesterov,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs" / "examples" / "gpt"))

import data  # noqa: E402  - of the example
from model import GPT  # noqa: E402

RANKS, BATCH, CONTEXT, WINDOWS = 2, 8, 64, 512
LAYERS, DIM, HEADS = 2, 64, 4
ADAM_LR, LAMB_LR = 3e-3, 1e-2
BETAS = (0.9, 0.95)
COUNTERPARTS = {
    "adam": "adam",
    "onebit": "adam",
    "onebit_divided": "adam",
    "zeroone": "adam",
    "no_feedback": "adam",
    "local": "adam",
    "local_sparse": "adam",
    "lamb": "lamb",
    "onebitlamb": "lamb",
    "onebitlamb_divided": "lamb",
    "zero3": "zero3",
    "zeropp": "zero3",
    "loco": "zero3",
}
"""Of each system: the one without compression that its loss is compared with."""
LABELS = {
    "adam": "Adam",
    "onebit": "1-bit Adam, 20 % at full precision",
    "onebit_divided": "1-bit Adam with stage 1, 20 %",
    "zeroone": "0/1 Adam, 50 %",
    "no_feedback": "1-bit Adam without error feedback, 20 %",
    "local": "LocalSGD, outer step every 10 steps",
    "local_sparse": "the same, top-k of an eighth",
    "lamb": "LAMB",
    "onebitlamb": "1-bit LAMB, 25 % at full precision",
    "onebitlamb_divided": "1-bit LAMB with stage 1, 25 %",
    "zero3": "ZeRO-3, AdamW",
    "zeropp": "ZeRO-3, 8-bit weights and 4-bit gradients",
    "loco": "the same, with LoCo's error feedback",
}


def prepared(
    system: str, model: torch.nn.Module, steps: int
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Returns the model and the optimizer of a system. Everything starts from the same values on all ranks."""
    params = list(model.parameters())
    if system in ("adam", "onebit", "no_feedback"):
        return model, OneBitAdam(
            params, ADAM_LR, BETAS, freeze_step=steps if system == "adam" else steps // 5
        )
    if system == "onebit_divided":
        return model, ShardedOneBitAdam(params, ADAM_LR, BETAS, freeze_step=steps // 5)
    if system == "zeroone":
        intervals = {"local_step_scaler": steps // 8, "local_step_clipper": 4}
        return model, ZeroOneAdam(
            params, ADAM_LR, BETAS, var_freeze_step=steps // 2, var_update_scaler=steps // 20, **intervals
        )
    if system in ("lamb", "onebitlamb", "onebitlamb_divided"):
        freeze = steps if system == "lamb" else steps // 4
        lamb = ShardedOneBitLamb if system == "onebitlamb_divided" else OneBitLamb
        return model, lamb(params, LAMB_LR, BETAS, freeze_step=freeze, weight_decay=0.01)
    plain = torch.optim.AdamW(params, ADAM_LR, BETAS, weight_decay=0.0)
    if system.startswith("local"):
        sparse = CompressionOptions(compressor=TopKCompressor(block_numel=512, kept=64))
        compression = sparse if system == "local_sparse" else None
        return model, LocalSGD(plain, nesterov(0.7, 0.6), 10, start_step=steps // 10, compression=compression)
    comm = ds_comm.collectives()
    if system != "zero3":
        reduce = LoCoReduceScatter() if system == "loco" else QuantizedReduceScatter()
        comm = ds_comm.collectives(all_gather=QuantizedAllGather(), reduce_scatter=reduce)
    model, optimizer = ds_zero.shard(model, plain, stage=3, comm=comm)
    return model, optimizer


def factor(step: int, total: int) -> float:
    """Of the peak learning rate in a step (from 0): a tenth of all steps to warm up, then a cosine to a twentieth."""
    warm = max(1, total // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1.0 + float(torch.tensor((step - warm) / (total - warm) * torch.pi).cos()))


@torch.no_grad()
def validate(model: torch.nn.Module, corpus: data.Corpus) -> float:
    """Mean loss over windows of held-out text, in nats per byte: each rank takes a part."""
    rank = dist.get_rank()
    inputs, targets = data.validation_windows(corpus.validation, count=WINDOWS, length=CONTEXT)
    own = zip(inputs.chunk(RANKS)[rank].split(64), targets.chunk(RANKS)[rank].split(64), strict=True)
    total = torch.stack([model(x, y) * len(x) for x, y in own]).sum()
    dist.all_reduce(total)
    return float(total) / WINDOWS


def train(system: str, seed: int, steps: int) -> dict[str, Any]:
    """Trains on this rank, and returns the loss before, half-way and after."""
    torch.manual_seed(seed)
    bare = GPT(LAYERS, DIM, HEADS)
    corpus = data.load()
    model, optimizer = prepared(system, bare, steps)
    begin, curve = time.monotonic(), [validate(model, corpus)]
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor(step, steps)
        inputs, targets = data.train_batch(
            corpus.train, seed=seed + 1, index=step * RANKS + dist.get_rank(), size=BATCH, length=CONTEXT
        )
        optimizer.zero_grad()
        model(inputs, targets).backward()
        optimizer.step()
        if system == "no_feedback" and optimizer.compressed_state.feedback is not None:
            optimizer.compressed_state.feedback.clear()
        if 2 * (step + 1) in (steps, 2 * steps):
            curve.append(validate(model, corpus))
    return {
        "curve": curve,
        "seconds": time.monotonic() - begin,
        "numel": sum(p.numel() for p in bare.parameters()),
    }


def worker(jobs: list[tuple[str, int]], steps: int, budget_s: float) -> None:
    """One rank; the first one prints each result. No run begins after `budget_s`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    end = time.monotonic() + budget_s
    for system, seed in jobs:
        late = torch.tensor(float(time.monotonic() > end))
        dist.all_reduce(late, dist.ReduceOp.MAX)
        if late:
            break
        result = train(system, seed, steps)
        if dist.get_rank() == 0:
            print("RESULT " + json.dumps([system, seed, result]), flush=True)
    dist.destroy_process_group()


def run(jobs: list[tuple[str, int]], options: argparse.Namespace) -> None:
    """Runs jobs on ranks of their own, one after the other, and keeps each result as soon as it is there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = json.dumps([jobs, options.steps, options.budget_s])
    environ = {**os.environ, "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", text],
            env={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        assert ranks[0].stdout is not None
        for line in ranks[0].stdout:
            if line.startswith("RESULT "):
                system, seed, result = json.loads(line.removeprefix("RESULT "))
                place(system, seed, options).write_text(json.dumps(result))
        statuses = [rank.wait(timeout=60.0) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(statuses):
        raise RuntimeError(f"a rank failed; exit statuses {statuses}")


def place(system: str, seed: int, options: argparse.Namespace) -> Path:
    """The file of a result."""
    folder: Path = options.folder
    return folder / f"{system}-{seed}-{options.steps}.json"


def table(results: dict[tuple[str, int], dict[str, Any]], systems: list[str], seeds: list[int]) -> str:
    """Markdown: the last loss of each run, and by how much it is above that of its counterpart."""
    heads = ["system", *(f"seed {seed}" for seed in seeds), "mean difference"]
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for system in systems:
        cells, differences = [LABELS[system]], []
        for seed in seeds:
            own, other = results.get((system, seed)), results.get((COUNTERPARTS[system], seed))
            cells.append("" if own is None else f"{own['curve'][-1]:.4f}")
            if own is not None and other is not None and system != COUNTERPARTS[system]:
                differences.append(own["curve"][-1] / other["curve"][-1] - 1)
                cells[-1] += f" ({differences[-1]:+.2%})"
        cells.append(f"{sum(differences) / len(differences):+.2%}" if differences else "")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Parses arguments, runs what is missing, prints the table of what there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--systems", default=",".join(LABELS))
    parser.add_argument("--budget-s", type=float, default=1e9)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench-converge")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        jobs, steps, budget_s = json.loads(options.worker)
        worker(jobs, steps, budget_s)
        return
    systems, seeds = options.systems.split(","), [int(seed) for seed in options.seeds.split(",")]
    unknown = sorted(set(systems) - set(LABELS))
    if unknown:
        sys.exit(f"ci/bench converge: no system {unknown[0]!r}; there are {', '.join(LABELS)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    wanted = [(system, seed) for seed in seeds for system in systems]
    missing = [job for job in wanted if not place(*job, options).exists()]
    if missing:
        run(missing, options)
    there = [job for job in wanted if place(*job, options).exists()]
    results = {job: json.loads(place(*job, options).read_text()) for job in there}
    print(table(results, systems, seeds))
    if len(there) < len(wanted):
        print(f"\n{len(wanted) - len(there)} runs are missing: run the command again")


if __name__ == "__main__":
    main()
