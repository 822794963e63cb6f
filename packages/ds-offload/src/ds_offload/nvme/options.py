"""Options of `NVMeStore`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verify = Literal["off", "sampled", "full"]


@dataclass(frozen=True, kw_only=True)
class NVMeOptions:
    """How an `NVMeStore` reads and writes its files."""

    backend: Literal["auto", "io_uring", "threads"] = "auto"
    """What executes the operations. "auto": io_uring where the system permits it, else threads."""
    block_bytes: int = 1 << 20
    """Bytes of one request to the disk. Larger tensors are divided into several requests."""
    queue_depth: int = 32
    """Maximum number of requests that the disk has at a time."""
    num_threads: int = 0
    """Number of threads of the backend "threads". 0: chosen by the engine."""
    direct: bool = True
    """Bypass the page cache (O_DIRECT) where the file system supports it."""
    verify: Verify = "full"
    """Which 1 MiB blocks of a tensor have a checksum, that is computed when they are written and compared when they are
    read. "sampled": the first, the last and one in 16 of the others, which change from write to write."""
