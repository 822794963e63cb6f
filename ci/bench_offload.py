"""A training step whose state is on a disk, beside the same step in memory and beside fio with the same bytes.
`ci/bench offload [--folder /local_nvme] [--write]`

Trains the model of docs/examples/offload/larger_than_memory.py in one process a contender. In each round each contender
makes some steps while the others wait, and after those from the disk fio moves the bytes that one step read and wrote
(counted by the system, /proc/PID/io). Time in a round: the median of the steps. The ratio is the time of
the step from the disk over the larger of two: the step in memory, and fio, which may read and write at once or one
after the other, whichever is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fio import BLOCK_BYTES, Job, huge_pages, machine, seconds

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "offload.md"
MARK = "<!-- results -->"
GOAL = 1.10
MEMORY, DISK, EARLY = "in memory", "from the disk", "from the disk, --overlap-step"
CONTENDERS = {
    MEMORY: ["--offload", "cpu"],
    DISK: ["--offload", "nvme"],
    # Its norm stays below this limit, so that no step that ran during the backward is taken back.
    EARLY: ["--offload", "nvme", "--overlap-step", "--clip", "1000"],
}


def io_bytes() -> tuple[int, int]:
    """Bytes that this process has read from disks and written to them."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])


def serve(arguments: list[str]) -> None:
    """A contender: makes as many steps as each line of the input says, and prints what they took, as JSON."""
    sys.path.insert(0, str(ROOT / "docs" / "examples" / "offload"))
    import larger_than_memory as example
    import torch

    import ds_engine
    import ds_zero

    sys.argv = ["larger_than_memory", "--limit-mib", "0", *arguments]
    args = example.arguments()
    example.warm_up(args)
    with ds_zero.deferred_init(stage=3):
        model = example.make_model(24)
    engine, *_ = ds_engine.initialize(model, example.configuration(args))
    step = 0
    for line in sys.stdin:
        took = []
        read, written = io_bytes()
        for _ in range(int(line)):
            began = time.perf_counter()
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(args.rows, example.WIDTH, generator=generator).to(example.DTYPES[args.dtype])
            loss = (engine(x).float() - x.float().flip(1)).square().mean()
            engine.backward(loss)
            engine.step()
            last = loss.item()
            took.append(time.perf_counter() - began)
            step += 1
        now_read, now_written = io_bytes()
        print(json.dumps({"seconds": took, "loss": repr(last), "read": (now_read - read) / len(took),
                          "written": (now_written - written) / len(took)}), flush=True)  # fmt: skip


@dataclass
class Contender:
    """A process that trains when it is told to."""

    process: subprocess.Popen[str]

    def steps(self, count: int) -> dict[str, Any]:
        """Makes steps: seconds of each, the last loss, bytes read and written a step."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"a contender ended with status {self.process.wait()}")

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        if self.process.wait(timeout=60) not in (0, None):
            print(f"a contender ended with status {self.process.returncode}", file=sys.stderr)


def start(arguments: list[str], folder: Path) -> Contender:
    """A contender of its own process."""
    command = [sys.executable, __file__, "--serve", *arguments, "--nvme-path", str(folder)]
    return Contender(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    )


def disk_alone(folder: Path, read: float, written: float, memory: str) -> float:
    """Seconds that fio needs for a step's bytes, in the faster of both orders."""

    def job(direction: str, num_bytes: float) -> Job:
        return Job(folder / f"fio.{direction}", direction, int(num_bytes) // BLOCK_BYTES * BLOCK_BYTES)

    jobs = [job("read", read), job("write", written)]
    at_once = seconds(jobs, "io_uring", memory)
    return min(at_once, sum(seconds([one], "io_uring", memory) for one in jobs))


def measure(folder: Path, rounds: int, steps: int, dtype: str, fio_memory: str) -> tuple[list[str], bool]:
    """The lines of the table, and whether the goal is reached."""
    # In fp32 the masters are the parameters, which the backward still reads: no step overlaps with it.
    wanted = [name for name in CONTENDERS if name != EARLY or dtype == "bf16"]
    contenders = {name: start([*CONTENDERS[name], "--dtype", dtype], folder) for name in wanted}
    first = {
        name: contender.steps(3) for name, contender in contenders.items()
    }  # allocates and fills the disk
    if len({first[name]["loss"] for name in (MEMORY, DISK)}) != 1:
        raise RuntimeError(f"the losses differ: {first}")
    took: dict[str, list[float]] = {name: [] for name in wanted}
    alone: dict[str, list[float]] = {name: [] for name in wanted[1:]}
    bytes_of: dict[str, list[tuple[float, float]]] = {name: [] for name in wanted[1:]}
    for index in range(rounds):
        turn = index % len(wanted)
        for name in wanted[turn:] + wanted[:turn]:
            result = contenders[name].steps(steps)
            took[name].append(statistics.median(result["seconds"]))
            if name != MEMORY:
                moved = (result["read"], result["written"])
                bytes_of[name].append(moved)
                alone[name].append(disk_alone(folder, *moved, fio_memory))
    for contender in contenders.values():
        contender.close()
    lines = ["| | seconds, each round | median | over the larger of memory and disk |", "|---|---|---|---|"]
    good = True

    def row(name: str, values: list[float], ratio: str) -> None:
        lines.append(
            f"| {name} | {' '.join(f'{x:.2f}' for x in values)} | {statistics.median(values):.3f} | {ratio} |"
        )

    row(MEMORY, took[MEMORY], "")
    for name in wanted[1:]:
        read, written = (statistics.median(x) / 1e9 for x in zip(*bytes_of[name], strict=True))
        row(f"fio alone: {read:.2f} GB read, {written:.2f} GB written", alone[name], "")
        # Of each round, since the rate of a shared disk changes between rounds.
        ratios = [mine / max(memory, disk) for mine, memory, disk in
                  zip(took[name], took[MEMORY], alone[name], strict=True)]  # fmt: skip
        ratio = statistics.median(ratios)
        good = good and ratio <= GOAL
        verdict = "reached" if ratio <= GOAL else "MISSED"
        row(
            name,
            took[name],
            f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), goal {GOAL:.2f} {verdict}",
        )
    return lines, good


def main() -> int:
    """Measures, prints, and on request writes the page."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(prog="ci/bench offload", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of each contender in a round")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of forward and backward")
    parser.add_argument("--write", action="store_true", help="put the result into docs/benchmarks/offload.md")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, huge_pages(128) as reserved:
        where = machine(Path(folder))
        lines, good = measure(
            Path(folder), args.rounds, args.steps, args.dtype, "mmaphuge" if reserved else "mmap"
        )
    pages = "huge pages" if reserved else "pages of 4 KiB"
    head = f"Machine: {where}; fio's buffers on {pages}. `{' '.join(['ci/bench offload', *sys.argv[1:]])}`"
    text = "\n".join([head, "", *lines, ""])
    print(text)
    if args.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
        after = rest[rest.index("\n## ") :]
        PAGE.write_text(f"{before}{MARK}\n{text}{after}", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
