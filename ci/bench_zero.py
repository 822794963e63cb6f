"""ZeRO beside its peers: one training job on gloo ranks under plain PyTorch, DDP, FSDP2, DeepSpeed and ours.

    ci/bench zero [--size small|medium|large] [--micro BxT] [--bf16] [--rounds N] [--systems a,b,...] [--ranks N]

Every round starts every system afresh, in turn, and times its steps after a warm-up; a figure is the median over all
steps of all rounds. Peak memory is the resident maximum above what the process had with the model built and nothing
wrapped. Bytes are what the kernel counted on the rank's TCP connections, so that they mean the same for every system.

Ours through the engine: `ours0` to `ours3`, with `-cpuadam` (states in host memory) or `-offload` (parameters too).
Ours in a plain loop: `zero0` to `zero3`; without ds-comm: `zero0-alone` to `zero3-alone`.
`DS_BENCH_PEER` names the environment with the peers, else .venv-peer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import socket
import statistics
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"small": (3, 136, 8), "medium": (6, 512, 8), "large": (12, 896, 8)}
"""Name -> layers, width, heads: 0.7, 19 and 116 million parameters."""
SYSTEMS = ["solo", "ddp", "fsdp2", "ours1", "ours2", "ours3", "ds1", "ds2", "ds3"]
WARM_UP = 3
ADAM: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
GOALS = [
    # (ours, peer, quantity, sizes, at most)
    ("ours1", "ddp", "step", {"medium", "large"}, 1.0),
    ("ours2", "ddp", "step", {"medium", "large"}, 1.0),
    ("ours3", "ddp", "step", {"small"}, 1.5),
    ("ours3", "fsdp2", "step", {"medium"}, 0.85),
    ("ours3", "fsdp2", "step", {"large"}, 0.65),
    ("ours3", "fsdp2", "memory", {"medium"}, 0.6),
    ("ours3", "fsdp2", "memory", {"large"}, 0.75),
    ("ours1", "ddp", "memory", {"medium", "large"}, 1.0),
    ("ours2", "ddp", "memory", {"medium", "large"}, 1.0),
    ("ours1", "ds1", "step", {"small", "medium", "large"}, 0.75),
    ("ours2", "ds2", "step", {"small", "medium", "large"}, 0.75),
    ("ours3", "ds3", "step", {"small", "medium", "large"}, 0.75),
]
SMALL_BATCH = ("ours3", "fsdp2", "step", {"medium"}, 0.65)
"""Takes the place of the goal at 19 M where communication dominates: micro-batches of 1 x 32."""


# --- one rank


def build(size: str, tokens: int) -> Any:
    """A decoder-only transformer over bytes, as plain as it gets. Shapes: B batch, T tokens, D width, H heads."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, dim: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.before_mix, self.before_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.inputs, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
            self.wide, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

        def forward(self, x: Any) -> Any:
            b, t, d = x.shape
            parts = self.inputs(self.before_mix(x)).view(b, t, 3, self.heads, d // self.heads)
            query, key, value = (p.transpose(1, 2) for p in parts.unbind(2))
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + self.output(mixed.transpose(1, 2).reshape(b, t, d))
            return x + self.narrow(functional.gelu(self.wide(self.before_mlp(x))))

    class Model(nn.Module):
        def __init__(self, layers: int, dim: int, heads: int) -> None:
            super().__init__()
            self.bytes, self.places = nn.Embedding(256, dim), nn.Embedding(tokens, dim)
            self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
            self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256, bias=False)
            for p in self.parameters():
                if p.ndim > 1:
                    nn.init.normal_(p, std=0.02)

        def forward(self, x: Any, y: Any) -> Any:
            h = self.bytes(x) + self.places(torch.arange(x.shape[1], device=x.device))
            for block in self.blocks:
                h = block(h)
            return functional.cross_entropy(self.head(self.norm(h)).flatten(0, 1).float(), y.flatten())

    torch.manual_seed(0)
    return Model(*SIZES[size])


def text() -> Any:
    """Two megabytes of the standard library's source."""
    import torch

    found = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found += path.read_bytes()
    return torch.frombuffer(found[:2_000_000], dtype=torch.uint8).long()


def batch(data: Any, micro: tuple[int, int], step: int, rank: int) -> tuple[Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(1000 * step + rank)
    starts = torch.randint(len(data) - micro[1] - 1, (micro[0],), generator=generator).tolist()
    rows = torch.stack([data[s : s + micro[1] + 1] for s in starts])
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def memory_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def sent_bytes() -> int:
    """Bytes that the peers of this process's TCP connections have acknowledged."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as s:
                if s.family in (socket.AF_INET, socket.AF_INET6) and s.type == socket.SOCK_STREAM:
                    info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
                    total += struct.unpack_from("Q", info, 120)[0]  # tcpi_bytes_acked
    return total


def moved_bytes(model: Any, name: str) -> int:
    """What this rank has sent so far; ours by its own count, which includes what is read from peer memory."""
    if not name.startswith(("ours", "zero")):
        return sent_bytes()
    from ds_zero import _registry

    comm = _registry.state_of(model).comm
    return comm.gathered_bytes + comm.reduced_bytes


Step = Callable[[Any, Any], Any]


def with_engine(model: Any, name: str, args: argparse.Namespace) -> Step:
    """Ours or DeepSpeed, by the same configuration."""
    import importlib

    ours = name.startswith("ours")
    system = importlib.import_module("ds_engine" if ours else "deepspeed")
    stage, _, variant = name.removeprefix("ours").removeprefix("ds").partition("-")
    zero: dict[str, Any] = {"stage": int(stage)}
    if variant:
        zero["offload_optimizer"] = {"device": "cpu"}
    if variant == "offload":
        zero["offload_param"] = {"device": "cpu"}
    adam: dict[str, Any] = {**ADAM, "betas": list(ADAM["betas"])}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": args.micro[0],
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": adam},
    }
    if args.bf16:
        config["bf16"] = {"enabled": True}
    if ours:
        config["startup_summary"] = False
    else:
        config["zero_allow_untested_optimizer"] = True
        if not variant:
            adam["torch_adam"] = True
    engine = system.initialize(model=model, model_parameters=model.parameters(), config=config)[0]

    def step(x: Any, y: Any) -> Any:
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        return loss

    return step


def with_zero(model: Any, name: str, args: argparse.Namespace) -> Step:
    """Ours in a loop that anyone would write."""
    import torch

    import ds_comm
    import ds_core.optim
    import ds_zero

    optimizer = ds_core.optim.FusedAdam(model.parameters(), **ADAM)
    comm = None if name.endswith("-alone") else ds_comm.collectives()
    config = ds_zero.ZeroConfig(param_dtype=torch.bfloat16 if args.bf16 else None)
    ds_zero.shard(model, optimizer, int(name[4]), config=config, comm=comm)

    def step(x: Any, y: Any) -> Any:
        loss = model(x, y)
        loss.backward()
        ds_zero.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def with_torch(model: Any, name: str, args: argparse.Namespace) -> Step:
    import torch
    from torch import nn

    autocast = args.bf16
    if name == "ddp":
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    elif name == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16} if args.bf16 else {}
        options: Any = {
            "mesh": init_device_mesh("cpu", (args.ranks,)),
            "mp_policy": MixedPrecisionPolicy(**half),
        }
        for block in model.blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)
        autocast = False
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAM)

    def step(x: Any, y: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def run_rank(args: argparse.Namespace) -> None:
    """One rank of one system; rank 0 prints the result."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    name, rank = args.rank_of, int(os.environ["RANK"])
    model = build(args.size, args.micro[1])
    numel = sum(p.numel() for p in model.parameters())
    data = text()
    base = memory_mb("VmRSS")
    if name != "solo":
        dist.init_process_group("gloo")
    wrap = with_zero if name.startswith("zero") else with_torch
    step = (with_engine if name.startswith(("ours", "ds")) else wrap)(model, name, args)
    seconds, losses, before, over_tcp = [], [], 0, 0
    for number in range(WARM_UP + args.steps):
        if number == WARM_UP:
            before, over_tcp = moved_bytes(model, name), sent_bytes()
        x, y = batch(data, args.micro, number, rank)
        if name != "solo":
            dist.barrier()
        start = time.perf_counter()
        loss = step(x, y)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    moved = (moved_bytes(model, name) - before) / args.steps
    sent = (sent_bytes() - over_tcp) / args.steps
    result = {
        "params": numel,
        "seconds": seconds[WARM_UP:],
        "peak_mb": memory_mb("VmHWM") - base,
        "moved_mb": moved / 1e6,
        "tcp_mb": sent / 1e6,
        "losses": losses,
    }
    if rank == 0:
        print("RESULT " + json.dumps(result), flush=True)
    if name != "solo":
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo and of peers have nothing more to do


# --- all ranks of all systems


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Rank 0's result."""
    python = args.peer_python if name.startswith("ds") else sys.executable
    ranks = 1 if name == "solo" else args.ranks
    port = str(free_port())
    sources = [str(p / "src") for p in sorted((ROOT / "packages").iterdir()) if p.name != "ds-core"]
    processes = []
    for rank in range(ranks):
        env = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1")
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": port}
        env |= {"LOCAL_WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
        env["PATH"] = f"{Path(python).parent}{os.pathsep}{env['PATH']}"
        if not name.startswith("ds"):
            env["PYTHONPATH"] = os.pathsep.join(sources)
        command = [python, __file__, "--rank-of", name, "--size", args.size, "--ranks", str(args.ranks)]
        command += ["--micro", "x".join(map(str, args.micro)), "--steps", str(args.steps)]
        command += ["--bf16"] if args.bf16 else []
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [p.communicate(timeout=1200) for p in processes]
    for out, _ in outputs:
        for line in out.splitlines():
            if line.startswith("RESULT "):
                found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                return found
    sys.exit(f"{name}: no result\n" + "\n".join(f"{out[-2000:]}\n{err[-4000:]}" for out, err in outputs))


def collect(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """System -> its result, with the seconds of all rounds."""
    found: dict[str, dict[str, Any]] = {}
    for number in range(args.rounds):
        for name in args.systems:
            result = run(name, args)
            held = found.setdefault(name, {**result, "seconds": []})
            held["seconds"] += result["seconds"]
            held["peak_mb"] = max(held["peak_mb"], result["peak_mb"])
            print(
                f"round {number + 1}: {name} {statistics.median(result['seconds']):.4f}",
                file=sys.stderr,
                flush=True,
            )
    return found


def report(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    first = next(iter(found.values()))
    micro = "x".join(map(str, args.micro))
    print(
        f"\n{first['params'] / 1e6:.1f} M parameters, {args.ranks} ranks, micro-batch {micro}, "
        f"{'bf16' if args.bf16 else 'fp32'}; {args.rounds} rounds of {args.steps} steps\n"
    )
    print(
        "| system | seconds a step, median (min) | peak MB above bare | MB moved a step | over TCP | last loss |"
    )
    print("|---|---|---|---|---|---|")
    for name, result in found.items():
        seconds = result["seconds"]
        print(
            f"| {name} | {statistics.median(seconds):.4f} ({min(seconds):.4f}) | {result['peak_mb']:.0f} | "
            f"{result['moved_mb']:.2f} | {result['tcp_mb']:.2f} | {result['losses'][-1]:.5f} |"
        )
    rows = judge(found, args)
    if rows:
        print("\n| ratio | found | at most | |\n|---|---|---|---|")
        print("\n".join(rows))
    print("\n" + json.dumps({name: result["losses"] for name, result in found.items()}), file=sys.stderr)


def judge(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> list[str]:
    """One table row for every goal whose two sides were run."""
    rows = []
    for goal in GOALS:
        ours, peer, quantity, sizes, limit = goal
        if args.micro == (1, 32) and goal[:4] == SMALL_BATCH[:4]:
            limit = SMALL_BATCH[4]
        if ours not in found or peer not in found or args.size not in sizes:
            continue
        values = [
            statistics.median(found[s]["seconds"]) if quantity == "step" else found[s]["peak_mb"]
            for s in (ours, peer)
        ]
        ratio = values[0] / values[1] if values[1] > 0 else math.inf
        verdict = "met" if ratio <= limit else "MISSED"
        rows.append(f"| {quantity}: {ours} / {peer} | {ratio:.2f} | {limit:.2f} | {verdict} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument(
        "--micro", type=lambda t: tuple(map(int, t.split("x"))), default=None, help="as in 4x128"
    )
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--systems", type=lambda t: t.split(","), default=SYSTEMS)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.micro is None:
        args.micro = {"small": (3, 53), "medium": (4, 128), "large": (2, 128)}[args.size]
    peer = Path(os.environ.get("DS_BENCH_PEER", ROOT / ".venv-peer"))
    args.peer_python = str(peer / "bin" / "python")
    if args.rank_of:
        run_rank(args)
    else:
        report(collect(args), args)


if __name__ == "__main__":
    main()
