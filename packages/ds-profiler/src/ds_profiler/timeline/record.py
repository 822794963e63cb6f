"""Records what a rank does, and reads the recordings of all ranks back."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.profiler import ProfilerActivity, profile

from ds_profiler.files import write_whole
from ds_profiler.timeline.clock import ClockOffset, offset_to_first_rank
from ds_profiler.timeline.spans import RankTimeline, Reading, read

_FILE = "rank{:05d}.json.gz"


@contextmanager
def record(
    folder: str | os.PathLike[str], *, group: ProcessGroup | None = None, reading: Reading | None = None
) -> Iterator[None]:
    """Records the code in the `with` block on this rank, and writes `<folder>/rank<number>.json.gz` at its end. All
    ranks must call it; where torch.distributed is not initialised, it records one rank.

    A few steps are enough: torch's profiler keeps every operation in memory until the end, and slows the steps down by
    some microseconds an operation.

    Args:
        folder: created if it is missing. One folder on a file system that all ranks see, or one on each machine, whose
            files are then brought together.
        group: the ranks; needs a backend for CPU tensors if it is given. Default: all ranks.
        reading: how events are sorted into lanes.
    """
    rank, offset = 0, ClockOffset(0, 0)
    if dist.is_available() and dist.is_initialized():
        rank = dist.get_rank(group)
        offset = _offset(group)
    how = replace(reading or Reading(), clock_offset_ns=offset.offset_ns, clock_error_ns=offset.error_ns)
    activities = [ProfilerActivity.CPU]
    if torch.accelerator.is_available():
        activities += [a for a in torch.profiler.supported_activities() if a is not ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True) as profiler:
        yield
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        timeline = read(json.loads(trace.read_bytes()), rank, socket.gethostname(), how)
    write(timeline, folder)


def _offset(group: ProcessGroup | None) -> ClockOffset:
    if group is not None or "gloo" in str(dist.get_backend_config()):
        return offset_to_first_rank(group)
    temporary = dist.new_group(backend="gloo")
    try:
        return offset_to_first_rank(temporary)
    finally:
        dist.destroy_process_group(temporary)


def write(timeline: RankTimeline, folder: str | os.PathLike[str]) -> Path:
    """Writes one rank's file; it appears complete or not at all."""
    path = Path(folder) / _FILE.format(timeline.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, gzip.compress(json.dumps(timeline.as_dict(), separators=(",", ":")).encode(), 6))
    return path


def load(folder: str | os.PathLike[str]) -> list[RankTimeline]:
    """The timelines of all ranks in a folder, by rank.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is damaged; the message names it.
    """
    paths = sorted(
        path for path in Path(folder).glob("rank*.json.gz") if re.fullmatch(r"rank\d+\.json\.gz", path.name)
    )
    if not paths:
        raise FileNotFoundError(
            f"{os.fspath(folder)} has no recordings (rank00000.json.gz, ...): record some steps with "
            "ds_profiler.timeline.record(folder)"
        )
    ranks = []
    for path in paths:
        try:
            ranks.append(RankTimeline.from_dict(json.loads(gzip.decompress(path.read_bytes()))))
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a recording of ds_profiler, or it is damaged: {error}"
            ) from error
    return ranks
