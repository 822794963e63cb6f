"""What a rank of `ci/bench comm` does: trains a transformer over bytes by one of several systems.

    PYTHONPATH=ci python -m slow_link.training steps|loss SYSTEM JSON

Ranks are those of the environment (RANK, WORLD_SIZE, MASTER_ADDR). The first rank prints "RESULT " and JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd

import ds_comm
import ds_zero
from ds_comm.exchange import CompressedHook, Hierarchy, QuantizedAllGather, QuantizedReduceScatter, wire
from ds_comm.optim import CompressionOptions, LocalSGD, OneBitAdam, ZeroOneAdam, nesterov
from slow_link.hosts import HEADERS, sent

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "examples" / "gpt"))

import data  # noqa: E402  - of the example
from model import GPT  # noqa: E402

LABELS = {
    "ddp": "DDP, fp32",
    "bf16": "DDP, bf16 hook",
    "powersgd2": "DDP, PowerSGD rank 2",
    "powersgd4": "DDP, PowerSGD rank 4",
    "hook": "DDP, our 1-bit hook",
    "onebit": "`OneBitAdam`",
    "onebit16": "`OneBitAdam`, first phase in bf16",
    "zeroone": "`ZeroOneAdam`",
    "zeroone16": "`ZeroOneAdam`, first phase in bf16",
    "local": "`LocalSGD`, outer step every 10 steps",
    "zero3": "ZeRO-3, fp32",
    "zero3bf16": "ZeRO-3, bf16",
    "zeropp": "ZeRO-3, qwZ + hpZ + qgZ",
}
WARM = 4
"""Steps before those that are measured: DDP arranges its buckets, PowerSGD and 1-bit Adam begin to compress."""
PEAK_LR = 1e-3
BATCH, CONTEXT = 4, 64
"""Of a rank's step when the loss counts: forward and backward of 19 M parameters then take a tenth of what an fp32
all-reduce takes at 100 Mb/s."""


EXACT = 0.2
"""Fraction of the steps at full precision, if the loss counts."""


def make_model(layers: int) -> GPT:
    """19.1 M parameters with 6 layers; the same on every rank."""
    torch.manual_seed(0)
    return GPT(layers, 512, 8)


def prepared(system: str, model: torch.nn.Module, freeze: int, local: int) -> tuple[Any, Any]:
    """The model and its optimizer.

    Args:
        freeze: steps at full precision.
        local: ranks on each host.
    """
    options = CompressionOptions(reduce_dtype=torch.bfloat16 if system.endswith("16") else torch.float32)
    if system in ("onebit", "onebit16"):
        return model, OneBitAdam(
            model.parameters(), PEAK_LR, (0.9, 0.95), freeze_step=freeze, compression=options
        )
    if system in ("zeroone", "zeroone16"):
        return model, ZeroOneAdam(
            model.parameters(), PEAK_LR, (0.9, 0.95), var_freeze_step=freeze, local_step_scaler=freeze // 2,
            local_step_clipper=4, compression=options,
        )  # fmt: skip
    if system == "local":
        adam = torch.optim.AdamW(model.parameters(), PEAK_LR, (0.9, 0.95), weight_decay=0.0)
        return model, LocalSGD(adam, nesterov(0.7, 0.6), 10, start_step=freeze // 2)
    if system.startswith("zero"):
        return zero(system, model, local)
    # One bucket for PowerSGD: its hook starts collectives in callbacks of the one before, which gloo runs in threads
    # of its own; with several buckets ranks start them in different orders ("Received data size doesn't match").
    powers = system.startswith("powersgd")
    model = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1024 if powers else None)
    if system == "bf16":
        model.register_comm_hook(None, bf16_hook)
    elif powers:
        state = powersgd.PowerSGDState(
            None, matrix_approximation_rank=int(system[8:]), start_powerSGD_iter=max(2, freeze)
        )
        model.register_comm_hook(state, powersgd.powerSGD_hook)
    elif system == "hook":
        model.register_comm_hook(CompressedHook(start_step=max(2, freeze)), CompressedHook.reduce)
    return model, torch.optim.AdamW(model.parameters(), PEAK_LR, (0.9, 0.95), weight_decay=0.0)


def zero(system: str, model: torch.nn.Module, local: int) -> tuple[Any, Any]:
    """Stage 3, as it is or with everything that ZeRO++ adds."""
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR, (0.9, 0.95), weight_decay=0.0)
    half = torch.bfloat16 if system == "zero3bf16" else None
    config = ds_zero.ZeroConfig(param_dtype=half, communication_dtype=half)
    comm = ds_comm.collectives()
    if system == "zeropp":
        exact = ds_comm.Collectives()
        config = ds_zero.ZeroConfig(secondary_ranks=local)
        comm = ds_comm.Collectives(
            all_gather=QuantizedAllGather(),
            reduce_scatter=QuantizedReduceScatter(hierarchy=Hierarchy.of(local) if local > 1 else None),
            axes={"secondary": exact, "replicate": exact},
        )
    return ds_zero.shard(model, optimizer, stage=3, config=config, comm=comm)


def bf16_hook(
    _, bucket
):  # DistributedDataParallel compares annotations with types: without them it takes any
    """Averages gradients in bf16. That of torch does the same, but refuses gloo."""
    half = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    work = dist.all_reduce(half, async_op=True)
    return work.get_future().then(lambda done: bucket.buffer().copy_(done.value()[0]))


def formula(system: str, numel: int, optimizer: Any, local: int) -> float | None:
    """Bytes that this host sends over the link in a step, by formula; None where we have none."""
    size = dist.get_world_size()
    if system in ("ddp", "bf16"):
        return wire.all_reduce_bytes(numel * (4 if system == "ddp" else 2), size)
    if system.startswith(("onebit", "zeroone")):
        share = 0.25 if system.startswith("zeroone") else 1.0
        return float(optimizer.compressed_state.wire_bytes + wire.all_reduce_bytes(16, size)) * share
    if system.startswith("zero"):
        hosts = size // local
        gather = numel * local * (size - local) / size  # every slice goes to every rank of the other hosts
        if system != "zeropp":
            return gather * 3 * (4 if system == "zero3" else 2)
        return gather * (1 + 4 / 256) + numel * (hosts - 1) / hosts * (0.5 + 4 / 256)
    return None


def settle() -> None:
    """Waits until all ranks are here and nothing is under way."""
    dist.barrier()
    time.sleep(1.0)


def steps(system: str, options: dict[str, Any]) -> None:
    """Times a few steps of 16 tokens, and counts their bytes."""
    local = options["local"]
    model: Any = make_model(options["layers"])
    numel = sum(p.numel() for p in model.parameters())
    tokens = torch.randint(256, (1, 17), generator=torch.Generator().manual_seed(dist.get_rank()))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    alone = computing(model, inputs, targets)
    model, optimizer = prepared(system, model, 2, local)
    times, before, loss = [], (0, 0), torch.zeros(())
    measured = 12 if system.startswith("zeroone") else options["steps"]
    for step in range(WARM + measured):
        if step == WARM:
            settle()
            before = sent()
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    settle()
    after = sent()
    own = times[WARM:]
    result = {
        "numel": numel,
        "step_s": sum(own) / measured if system.startswith("zeroone") else sorted(own)[measured // 2],
        "payload": (after[0] - before[0] - HEADERS * (after[1] - before[1])) / measured,
        "formula": formula(system, numel, optimizer, local),
        "loss": loss.item(),
        "alone_s": alone,
        "ranks": dist.get_world_size(),
    }
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, result)
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(gathered), flush=True)


def computing(model: Any, inputs: Tensor, targets: Tensor) -> float:
    """Median time of forward and backward without communication, on all hosts at once."""
    times = []
    for _ in range(5):
        dist.barrier()
        begin = time.perf_counter()
        model(inputs, targets).backward()
        times.append(time.perf_counter() - begin)
        model.zero_grad()
    return sorted(times)[2]


def rate(step: int, total: int) -> float:
    """Learning rate of a step (from 0): a tenth of all steps to warm up, then a cosine to a twentieth."""
    warm = max(1, total // 10)
    if step < warm:
        return PEAK_LR * (step + 1) / warm
    turn = torch.tensor((step - warm) / max(1, total - warm) * torch.pi)
    return PEAK_LR * (0.05 + 0.95 * 0.5 * (1.0 + float(turn.cos())))


def train(system: str, options: dict[str, Any]) -> None:
    """Trains on real text for at most `piece_s` seconds, from where the last piece ended. Saves every rank's state."""
    total, rank = options["train_steps"], dist.get_rank()
    place = Path(options["state"] + f".rank{rank}.pt")
    corpus = data.load()
    bare = make_model(options["layers"])
    model, optimizer = prepared(system, bare, max(2, round(total * EXACT)), options["local"])
    saved: dict[str, Any] = {"step": 0, "seconds": 0.0, "curve": [], "times": []}
    if place.exists():
        saved = torch.load(place, weights_only=False)
        bare.load_state_dict(saved.pop("model"))
        optimizer.load_state_dict(saved.pop("optimizer"))
    elif total:
        saved["curve"].append((0, 0.0, validate(bare, corpus, options["windows"])))
    end = time.monotonic() + options["piece_s"]
    while saved["step"] < total and going(end):
        step = saved["step"]
        index = step * dist.get_world_size() + rank
        inputs, targets = data.train_batch(corpus.train, seed=1, index=index, size=BATCH, length=CONTEXT)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, total)
        dist.barrier()
        begin = time.perf_counter()
        optimizer.zero_grad()
        model(inputs, targets).backward()
        optimizer.step()
        saved["times"].append(time.perf_counter() - begin)
        saved["seconds"] += saved["times"][-1]
        saved["step"] = step + 1
        if saved["step"] % options["validate_every"] == 0 or saved["step"] == total:
            saved["curve"].append(
                (saved["step"], saved["seconds"], validate(bare, corpus, options["windows"]))
            )
    if system.startswith("powersgd") and saved["step"] < total:
        raise SystemExit(
            "PowerSGD cannot continue later: DDP would arrange its bucket anew; allow a longer piece"
        )
    torch.save({**saved, "model": bare.state_dict(), "optimizer": optimizer.state_dict()}, place)
    if rank == 0:
        print("RESULT " + json.dumps({**saved, "total": total}), flush=True)


def going(end: float) -> bool:
    """Whether all ranks have time for a step more."""
    late = torch.tensor(float(time.monotonic() > end))
    dist.all_reduce(late, dist.ReduceOp.MAX)
    return not late


@torch.no_grad()
def validate(model: torch.nn.Module, corpus: data.Corpus, windows: int) -> float:
    """Mean loss on held-out text, in nats per byte: each rank takes a part. Not part of the time."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    inputs, targets = data.validation_windows(
        corpus.validation, count=windows // ranks * ranks, length=CONTEXT
    )
    own = zip(inputs.chunk(ranks)[rank].split(16), targets.chunk(ranks)[rank].split(16), strict=True)
    total = torch.stack([model(x, y) * len(x) for x, y in own]).sum()
    dist.all_reduce(total)
    return float(total) / (windows // ranks * ranks)


def main() -> None:
    """Reads arguments, joins the ranks, trains."""
    what, system, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    (steps if what == "steps" else train)(system, options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
