"""File I/O of ds_core against fio and DeepSpeed's async_io.  `ci/bench io [--write]`

Sequential, with O_DIRECT. All contenders use requests of 1 MiB, 32 in flight, on files of their own in one folder,
which were written before. In each round every contender writes its file and reads it again, from a rotating start. A
contender's time is the 20th percentile of its rounds; a ratio is the peer's time over ours, above 1 where we are
faster. fio gets huge pages, like ds_core's arena: with small ones the device is given as many pieces as there are
pages. It is the limit of the device as far as one can measure it from a program, and its buffers are only 32 MiB, not
as large as the file.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_core import arena
from ds_core.io import Engine
from fio import BLOCK_BYTES, QUEUE_DEPTH, Job, huge_pages, machine, seconds

PAGE = Path("docs/benchmarks/io.md")
OURS, FIO, DEEPSPEED = "ds_core, arena", "fio", "DeepSpeed"
GOALS = {DEEPSPEED: 1.3, FIO: 0.97}
"""Of our time against the fastest contender whose name begins so."""
Seconds = float


@dataclass(frozen=True)
class Contender:
    """`write` and `read` move the whole file once and return how long that took, in seconds."""

    write: Callable[[], Seconds]
    read: Callable[[], Seconds]
    close: Callable[[], object] = lambda: None


def timed(action: Callable[[], object]) -> Seconds:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def ours(path: Path, num_bytes: int, backend: str, make: Callable[..., torch.Tensor]) -> Contender:
    buffer = make(num_bytes, dtype=torch.uint8).random_(0, 256)
    engine = Engine(backend=backend, block_bytes=BLOCK_BYTES, queue_depth=QUEUE_DEPTH)  # type: ignore[arg-type]
    file = engine.open(path, create=True, num_bytes=num_bytes)
    if not file.direct:
        raise SystemExit(
            f"bench io: {path.parent} has no direct I/O ({file.reason}); name another folder with --dir"
        )
    return Contender(
        lambda: timed(lambda: file.write(buffer).wait()),
        lambda: timed(lambda: file.read(buffer).wait()),
        engine.close,
    )


def deepspeed(path: Path, num_bytes: int, num_threads: int, locked: bool) -> Contender:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    handle = (
        AsyncIOBuilder().load(verbose=False).aio_handle(BLOCK_BYTES, QUEUE_DEPTH, False, True, num_threads)
    )
    example = torch.empty(0, dtype=torch.uint8)
    buffer = (
        handle.new_cpu_locked_tensor(num_bytes, example)
        if locked
        else torch.empty(num_bytes, dtype=torch.uint8)
    )
    buffer.random_(0, 256)

    def check(result: int) -> None:
        if result != 1:
            raise RuntimeError(f"DeepSpeed's I/O returned {result}")

    return Contender(
        lambda: timed(lambda: check(handle.sync_pwrite(buffer, str(path), 0))),
        lambda: timed(lambda: check(handle.sync_pread(buffer, str(path), 0))),
        lambda: handle.free_cpu_locked_tensor(buffer) if locked else None,
    )


def fio(path: Path, num_bytes: int, engine: str, memory: str) -> Contender:
    def run(direction: str) -> Seconds:
        return seconds([Job(path, direction, num_bytes)], engine, memory)

    return Contender(lambda: run("write"), lambda: run("read"))


def contenders(
    folder: Path, num_bytes: int, with_huge_pages: bool, with_deepspeed: bool
) -> dict[str, Contender]:
    memory, pages = ("shmhuge", "huge pages") if with_huge_pages else ("mmap", "4 KiB pages")
    names: list[tuple[str, Callable[..., Contender], tuple[Any, ...]]] = [
        (OURS, ours, ("auto", arena.empty)),
        ("ds_core threads, arena", ours, ("threads", arena.empty)),
        ("ds_core, torch.empty", ours, ("auto", torch.empty)),
        (f"{FIO} io_uring, {pages}", fio, ("io_uring", memory)),
        (f"{FIO} libaio, {pages}", fio, ("libaio", memory)),
    ]
    if with_deepspeed:
        names += [
            (f"{DEEPSPEED} locked tensor, 1 thread", deepspeed, (1, True)),
            (f"{DEEPSPEED} locked tensor, 4 threads", deepspeed, (4, True)),
            ("pageable DeepSpeed, 1 thread", deepspeed, (1, False)),
        ]
    return {name: make(folder / f"file{k}", num_bytes, *rest) for k, (name, make, rest) in enumerate(names)}


def measure(all_of_them: dict[str, Contender], rounds: int) -> dict[str, dict[str, Seconds]]:
    """The 20th percentile of seconds by direction and contender; the first round, which allocates, does not count."""
    names = list(all_of_them)
    times: dict[str, dict[str, list[Seconds]]] = {d: {n: [] for n in names} for d in ("write", "read")}
    for turn in range(rounds + 1):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]
            for direction, of_direction in times.items():
                seconds = getattr(all_of_them[name], direction)()
                if turn > 0:
                    of_direction[name].append(seconds)
    return {d: {n: float(np.percentile(t, 20)) for n, t in of_d.items()} for d, of_d in times.items()}


def report(results: list[dict[str, dict[str, Seconds]]], num_bytes: int) -> tuple[list[str], bool]:
    """Tables, and whether every goal is reached."""
    lines, good = [], True
    for direction in ("write", "read"):
        lines += [f"### {direction}", "", "| contender | GB/s | time / ours (runs) |", "|---|---|---|"]
        ratios: dict[str, float] = {}
        for name in results[0][direction]:
            each = [r[direction][name] / r[direction][OURS] for r in results]
            ratios[name] = statistics.median(each)
            rate = statistics.median(num_bytes / r[direction][name] / 1e9 for r in results)
            lines.append(
                f"| {name} | {rate:.2f} | {ratios[name]:.2f} ({' '.join(f'{x:.2f}' for x in each)}) |"
            )
        lines.append("")
        for peer, goal in GOALS.items():
            best = min((ratio for name, ratio in ratios.items() if name.startswith(peer)), default=None)
            if best is None:
                continue
            good &= best >= goal
            verdict = "reached" if best >= goal else "MISSED"
            lines.append(f"Against the fastest of {peer}: {best:.2f}, goal {goal:.2f}: {verdict}.")
        lines.append("")
    return lines, good


def main() -> int:
    parser = argparse.ArgumentParser(prog="ci/bench io", description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="size of each file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("build"), help="on the file system to measure")
    parser.add_argument("--no-peer", action="store_true", help="without DeepSpeed: fio is enough, and .venv")
    parser.add_argument("--write", action="store_true", help="put the result into docs/benchmarks/io.md")
    options = parser.parse_args()
    num_bytes = int(options.gib * 2**30) // BLOCK_BYTES * BLOCK_BYTES
    if not options.no_peer:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        AsyncIOBuilder().load(verbose=False)  # compiled before anything is measured
    results = []
    with huge_pages() as with_huge_pages:
        for _ in range(options.runs):
            with tempfile.TemporaryDirectory(dir=options.dir, prefix="bench-io-") as folder:
                all_of_them = contenders(Path(folder), num_bytes, with_huge_pages, not options.no_peer)
                results.append(measure(all_of_them, options.rounds))
                for contender in all_of_them.values():
                    contender.close()
                del all_of_them
    tables, good = report(results, num_bytes)
    lines = [f"Machine: {machine(options.dir)}.", f"Command: `ci/bench {' '.join(['io', *sys.argv[1:]])}`",
             f"Files of {num_bytes / 2**30:g} GiB, {options.rounds} rounds, {options.runs} runs.", "",
             *tables]  # fmt: skip
    if options.write:
        head = PAGE.read_text().split("<!-- results -->")[0] if PAGE.exists() else "# File I/O\n\n"
        PAGE.write_text(head + "<!-- results -->\n" + "\n".join(lines))
    print("\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
