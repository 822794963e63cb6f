"""Functions that the ranks of test_notebook.py import."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def summed(factor: float) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    import ds_comm

    world = ds_comm.start(device="cpu", timeout_s=60)
    x = torch.tensor(factor * 10.0**world.rank)
    dist.all_reduce(x)
    print(f"hello from {world.rank}")
    print("to stderr", file=sys.stderr)
    return {"rank": world.rank, "sum": x.item(), "by": world.source, "threads": os.environ["OMP_NUM_THREADS"]}


class OddError(Exception):
    """It cannot be rebuilt from its message."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def failing(kind: str, folder: str) -> None:
    """Rank 1 fails, and rank 0 waits for it."""
    Path(folder, f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
    if os.environ["RANK"] == "0":
        time.sleep(600)
    while not Path(folder, "pid0").exists():
        time.sleep(0.01)
    if kind == "value":
        raise ValueError("nobody expects 42")
    if kind == "odd":
        raise OddError(1, 2)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(0 if kind == "exit" else 3)


def unpicklable() -> Any:
    return lambda: None


def leaving() -> None:
    sys.exit(0)
