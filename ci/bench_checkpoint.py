"""Checkpoints: what a save in the background costs training, how fast saves and loads are, and what resharding costs.

    ci/bench checkpoint [--parts blocking,bf16,speed,reshard,memory] [--rounds N] [--width W] [--layers L] [--dir D]
        [--write]

Peers in the same run, in turn: `torch.distributed.checkpoint.async_save` with its defaults, given the same tensors of
the same job; `fio` with as many files, buffered with fsync, and O_DIRECT (without fio a plain loop of ours stands in,
and the table says so). In "memory", two ranks play a host each, and the peer is our own load from the disk.
--write puts the tables into docs/benchmarks/checkpoint.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from workloads import checkpoint_in_memory as in_memory

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/benchmarks/checkpoint.md"
ROWS = 96
"""Samples of a micro-batch."""
ORDINARY = 4
"""Ordinary steps that are timed before each save."""
MB = 1e6


# --- one rank


def build(args: argparse.Namespace, *, checkpoint: dict[str, Any] | None = None, trained: bool = True) -> Any:
    """An engine over a stack of square layers; if `trained`, for one step, so that Adam has its states."""
    import torch
    from torch import nn

    import ds_engine

    torch.manual_seed(0)
    layers = [nn.Linear(args.width, args.width, bias=False) for _ in range(args.layers)]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": args.bf16},
        "steps_per_print": 10**9,
        "startup_summary": False,
        "checkpoint": checkpoint or {},
    }
    engine, *_ = ds_engine.initialize(model=nn.Sequential(*layers), config=config)
    engine.progress.write = lambda line: None
    if trained:
        step(engine, args)
    return engine


def step(engine: Any, args: argparse.Namespace) -> float:
    """Seconds of one optimizer step."""
    import torch

    x = torch.ones(ROWS, args.width)
    begin = time.perf_counter()
    engine.backward(engine(x).square().mean())
    engine.step()
    return time.perf_counter() - begin


def barrier() -> None:
    import torch.distributed as dist

    dist.barrier()


def timed(action: Callable[[], Any]) -> float:
    """Seconds until all ranks have done it."""
    barrier()
    begin = time.perf_counter()
    action()
    barrier()
    return time.perf_counter() - begin


def blocking(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Seconds beyond ordinary steps, per round: of the call and the step after it, and of all steps until the
    checkpoint was complete.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    import ds_zero

    engine = build(args, checkpoint={"writer": {"decoupled": True}})
    rank = dist.get_rank()
    group = dist.new_group(
        backend="gloo"
    )  # collectives of its thread and of training would meet in one group

    def ours(folder: Path) -> Callable[[], bool]:
        engine.save_checkpoint(folder)
        return lambda: not engine.savers.background.busy

    # As large as what we save, and each with a storage of its own, which is what its writer likes best.
    tensors = {
        f"{r.fqn}/{r.state}@{r.flat_offset}": r.data.clone()
        for r in ds_zero.records(engine.module, engine.optimizer)
    }

    def theirs(folder: Path) -> Callable[[], bool]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            future: Any = dcp.async_save(tensors, checkpoint_id=str(folder), process_group=group)
        assert isinstance(future, Future)
        return future.done

    found: dict[str, Any] = {"ordinary": []}
    for number in range(args.rounds + 1):
        for name, save in (("ours", ours), ("async_save", theirs)):
            folder = root / f"{name}{number}"
            barrier()
            usual = [step(engine, args) for _ in range(ORDINARY)]
            begin = time.perf_counter()
            done = save(folder)
            call = time.perf_counter() - begin
            after = [step(engine, args)]
            while not agreed(done()):
                after.append(step(engine, args))
            engine.wait_for_checkpoint()
            barrier()
            if rank == 0:
                shutil.rmtree(folder)
            if number == 0:
                continue  # buffers, groups and threads come into being
            base = statistics.median(usual)
            found["ordinary"].append(base)
            found.setdefault(name, []).append(
                {
                    "call": call,
                    "blocked": call + after[0] - base,
                    "all": call + sum(after) - len(after) * base,
                }
            )
            os.sync() if rank == 0 else None
    found["mb"] = sum(r.data.nbytes for r in ds_zero.records(engine.module, engine.optimizer)) / MB
    engine.destroy()
    return found


def agreed(mine: bool) -> bool:
    """Whether it is so on every rank."""
    import torch
    import torch.distributed as dist

    flag = torch.tensor([int(mine)])
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def forget_pages(folder: Path) -> None:
    """Let the system drop what it has cached of these files; they are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def fio(folder: Path, files: int, num_bytes: int, *, write: bool, direct: bool) -> float:
    """Seconds to write (until they are on the disk) or read `files` files of `num_bytes` together."""
    each = num_bytes // files // (1 << 20) << 20
    for path in folder.iterdir() if write else ():
        path.unlink()  # a checkpoint is new files, too
    if shutil.which("fio") is None:
        return plain_loop(folder, files, each, write=write)
    command = [
        "fio",
        "--name=peer",
        f"--directory={folder}",
        f"--rw={'write' if write else 'read'}",
        "--bs=1M",
    ]
    command += [f"--size={each}", f"--numjobs={files}", f"--direct={int(direct)}", "--ioengine=psync"]
    command += ["--end_fsync=1", "--invalidate=1", "--fallocate=none", "--thread", "--output-format=json"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    jobs = json.loads(said[said.index("{") :])["jobs"]
    return max(float(job["job_runtime"]) for job in jobs) / 1000 * (num_bytes / (each * files))


def plain_loop(folder: Path, files: int, each: int, *, write: bool) -> float:
    block = bytearray(os.urandom(1 << 20))
    begin = time.perf_counter()
    for number in range(files):
        path = folder / f"plain{number}"
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
        for _ in range(each >> 20):
            os.write(descriptor, block) if write else os.readv(descriptor, [block])
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - begin


def speed(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Seconds of saves, cold and warm loads, and of fio's equivalents."""
    import torch.distributed as dist

    engine = build(args)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}

    def note(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(seconds)

    num_bytes = 0
    peers = [(f"fio {how}", how == "direct") for how in ("buffered", "direct")]
    for number in range(args.rounds + 1):
        if rank == 0:
            shutil.rmtree(root / "ours", ignore_errors=True)  # as with fio: what was there is not part of it
        note("save ours", timed(lambda: engine.save_checkpoint(root / "ours", "tag")))
        num_bytes = sum(p.stat().st_size for p in (root / "ours" / "tag").iterdir())
        for name, direct in peers:
            (root / name).mkdir(exist_ok=True)
            if rank == 0:
                note(f"save {name}", fio(root / name, ranks, num_bytes, write=True, direct=direct))
            barrier()
        if rank == 0:
            forget_pages(root / "ours")
        note("load ours", timed(lambda: engine.load_checkpoint(root / "ours")))
        for name, direct in peers:
            if rank == 0:
                note(f"load {name}", fio(root / name, ranks, num_bytes, write=False, direct=direct))
            barrier()
        note("load ours again", timed(lambda: engine.load_checkpoint(root / "ours")))
        if number == 0 and rank == 0:
            found.clear()  # memory and files come into being
    engine.destroy()
    return {"mb": num_bytes / MB, "files": ranks, "fio": shutil.which("fio") is not None, "seconds": found}


def save_for_reshard(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    import torch.distributed as dist

    engine = build(args)
    engine.save_checkpoint(root / f"from{dist.get_world_size()}")
    engine.destroy()
    return {}


def reshard(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Seconds of loads on these ranks of what 1, 2, 3 and 4 ranks have written."""
    import torch.distributed as dist

    engine = build(args)
    found: dict[str, list[float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(args.rounds + 1):
            for writers in args.writers:
                folder = root / f"from{writers}"
                for kind in ("cached", "cold"):
                    if kind == "cold" and dist.get_rank() == 0:
                        forget_pages(folder)
                    seconds = timed(lambda: engine.load_checkpoint(folder))  # noqa: B023 - called at once
                    if number > 0:
                        found.setdefault(f"{writers} {kind}", []).append(seconds)
    engine.destroy()
    return found


PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "blocking": blocking,
    "speed": speed,
    "reshard": reshard,
    "save_for_reshard": save_for_reshard,
    "memory": in_memory.memory,
    "restart_memory": functools.partial(in_memory.restart, copies=True),
    "restart_disk": functools.partial(in_memory.restart, copies=False),
}


def child(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = PARTS[args.child](args, Path(args.dir))
    if dist.get_rank() == 0:
        print("RESULT", json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()


# --- all of them


def launch(args: argparse.Namespace, part: str, ranks: int, folder: Path) -> dict[str, Any]:
    """Run a part on some ranks; what rank 0 found."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    command = [sys.executable, __file__, "--child", part, "--dir", str(folder)]
    command += ["--rounds", str(args.rounds), "--width", str(args.width), "--layers", str(args.layers)]
    command += ["--bf16"] * args.bf16
    processes = []
    for rank in range(ranks):
        env = dict(os.environ, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        env |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "DS_BENCH_START": str(time.time()),
        }
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"{part} failed on {ranks} ranks")
    line = next(line for line in outputs[0].splitlines() if line.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def spread(values: list[float], unit: float = 1.0, digits: int = 3) -> str:
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median * unit:.{digits}f} ({low * unit:.{digits}f} to {high * unit:.{digits}f})"


def blocking_table(args: argparse.Namespace, folder: Path) -> list[str]:
    lines = [
        "| ranks | job | ordinary step, s | system | the call, ms | call and next step over ordinary, ms | all steps "
        "until written over ordinary, ms | next to async_save |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ranks in args.ranks:
        found = launch(args, "blocking", ranks, folder / f"blocking{ranks}")
        peer = statistics.median(r["blocked"] for r in found["async_save"])
        for name in ("ours", "async_save"):
            rounds = found[name]
            cells = [spread([r[key] for r in rounds], 1000, 1) for key in ("call", "blocked", "all")]
            ratio = statistics.median(r["blocked"] for r in rounds) / peer
            job = f"{found['mb']:.0f} MB a rank, {'bf16' if args.bf16 else 'fp32'}"
            lines.append(
                f"| {ranks} | {job} | {spread(found['ordinary'])} | {name} | {' | '.join(cells)} | {ratio:.2f} |"
            )
    return lines


def speed_table(args: argparse.Namespace, folder: Path) -> list[str]:
    lines = ["| files | MB | what | MB/s, median (range) | ours next to it |", "|---|---|---|---|---|"]
    for ranks in args.ranks:
        found = launch(args, "speed", ranks, folder / f"speed{ranks}")
        seconds, size = found["seconds"], found["mb"]
        for name, times in sorted(seconds.items(), key=lambda item: item[0].split()[0], reverse=True):
            kind = "save" if name.startswith("save") else "load"
            ratio = statistics.median(times) / statistics.median(seconds[f"{kind} ours"])
            ratio = 1.0 if "again" in name else ratio
            shown = name if found["fio"] else name.replace("fio", "plain loop")
            rates = spread([size / t for t in times], digits=0)
            lines.append(f"| {ranks} | {size:.0f} | {shown} | {rates} | {ratio:.2f} |")
    return lines


def reshard_table(args: argparse.Namespace, folder: Path) -> list[str]:
    for writers in args.writers:
        launch(args, "save_for_reshard", writers, folder / "reshard")
    found = launch(args, "reshard", 2, folder / "reshard")
    lines = [
        "| written by | loaded by | cached | seconds, median (range) | next to 2 ranks |",
        "|---|---|---|---|---|",
    ]
    for name, times in found.items():
        writers, kind = name.split()
        ratio = statistics.median(times) / statistics.median(found[f"2 {kind}"])
        lines.append(f"| {writers} | 2 | {kind} | {spread(times)} | {ratio:.2f} |")
    return lines


def memory_table(args: argparse.Namespace, folder: Path) -> list[str]:
    shared = Path("/dev/shm") / folder.name
    try:
        found = launch(args, "memory", 2, folder / "memory")
        starts = {
            how: [launch(args, f"restart_{how}", 2, folder / "memory") for _ in range(min(3, args.rounds))]
            for how in ("memory", "disk")
        }
    finally:
        shutil.rmtree(shared, ignore_errors=True)
    seconds = found["seconds"]
    share = statistics.median(seconds["copy"]) / statistics.median(seconds["ordinary"])
    lines = [
        f"Two hosts of one rank, {found['mb']:.0f} MB on each: half of its own, half of the other one's. A copy takes "
        f"{share:.2f} of an ordinary step: {share / 10:.1%} of the time if every 10th step is copied, "
        f"{share / 100:.1%} if every 100th is.",
        "",
        "| what | seconds, median (range) |",
        "|---|---|",
    ]
    lines += (f"| {name} | {spread(times)} |" for name, times in seconds.items())
    for how, runs in starts.items():
        lines.append(f"| restart from {how}: the load | {spread([run['load'] for run in runs])} |")
        lines.append(
            f"| restart from {how}: from the start of the processes | {spread([run['total'] for run in runs])} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="blocking,bf16,speed,reshard,memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument(
        "--dir", default=None, help="on the disk that is to be measured; default the system's"
    )
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.writers = [2, 1, 3, 4]
    if args.child:
        child(args)
        return
    tables = {
        "blocking": blocking_table,
        "bf16": blocking_table,
        "speed": speed_table,
        "reshard": reshard_table,
        "memory": memory_table,
    }
    for part in args.parts.split(","):
        args.bf16 = part == "bf16"
        lines = [f"Load average at the start {os.getloadavg()[0]:.1f}, {args.rounds} rounds."]
        with tempfile.TemporaryDirectory(dir=args.dir, prefix="ds-bench-") as folder:
            lines += ["", *tables[part](args, Path(folder))]
            print(f"**{part}**", "", *lines, "", sep="\n", flush=True)
        if args.write:
            replace_part(part, "\n".join(lines))


def replace_part(part: str, text: str) -> None:
    """Put a part's table between its two marks on the page."""
    page = PAGE.read_text()
    head, _, rest = page.partition(f"<!-- {part} -->\n")
    _, _, tail = rest.partition(f"<!-- end {part} -->")
    PAGE.write_text(f"{head}<!-- {part} -->\n{text.strip()}\n<!-- end {part} -->{tail}")


if __name__ == "__main__":
    main()
