"""Sends the files of ranks to other hosts, and checks what arrives.

A file is sent from its pages in memory, and received into those of the new file, without a further copy.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_checkpoint.disk.crc import crc32c
from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format.datafile import DataFile, FileInfo
from ds_checkpoint.memory.placement import Transfer
from ds_checkpoint.team import Team

CHUNK_BYTES = 64 << 20
"""A file is sent in pieces of at most this size."""


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """One rank's file and its part of the manifest (see `write_file`)."""

    path: Path
    fragment: bytes

    @property
    def described(self) -> dict[str, Any]:
        """The part of the manifest."""
        content: dict[str, Any] = json.loads(self.fragment)
        return content


def replicate(
    team: Team, group: dist.ProcessGroup, mine: Parcel, transfers: Sequence[Transfer], doing: str
) -> None:
    """Sends this rank's file to its targets, and receives and checks the files for which this rank is a target. All
    ranks must call it.

    Raises:
        CheckpointError: on every rank, if any rank has no room for a file, or receives another than was sent.
    """
    sizes = [json.loads(part) for part in team.exchange(_sizes(mine))]
    incoming = [transfer.source for transfer in transfers if transfer.target == team.rank]
    targets = [transfer.target for transfer in transfers if transfer.source == team.rank]
    paths = {source: mine.path.parent / sizes[source]["file"] for source in incoming}

    def allocate() -> None:
        for source, path in paths.items():
            with path.open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, sizes[source]["num_bytes"]))

    # All memory is there before anything is sent: a rank that fails alone in the middle would leave others waiting.
    team.together(doing, allocate)
    fragments = {source: torch.empty(sizes[source]["fragment"], dtype=torch.uint8) for source in incoming}

    def communicate() -> None:
        works: list[dist.Work | None] = []
        with _mapped([mine.path], write=False) as own, _mapped(list(paths.values()), write=True) as rooms:
            fragment = torch.frombuffer(bytearray(mine.fragment), dtype=torch.uint8)
            for source, room in zip(incoming, rooms, strict=True):
                works += (dist.irecv(part, src=source, group=group) for part in _parts(fragments[source]))
                works += (dist.irecv(part, src=source, group=group) for part in _parts(room))
            for target in targets:
                works += (dist.isend(part, dst=target, group=group) for part in _parts(fragment))
                works += (dist.isend(part, dst=target, group=group) for part in _parts(own[0]))
            for work in works:
                assert work is not None
                work.wait()

    team.watch(communicate)

    def check() -> None:
        for source, path in paths.items():
            arrived = Parcel(path=path, fragment=fragments[source].numpy().tobytes())
            problem = damage(arrived)
            if problem is not None:
                raise CheckpointError(f"the copy of rank {source}'s part did not arrive intact: {problem}")

    team.together(doing, check)


def damage(parcel: Parcel) -> str | None:
    """Reads a whole file, and describes what differs from its part of the manifest; None if nothing does."""
    try:
        described = parcel.described
        info = FileInfo(**described["info"])
        file = DataFile(parcel.path, info)
    except (CheckpointError, ValueError, KeyError, TypeError) as error:
        return str(error)
    try:
        with _mapped([parcel.path], write=False) as (content,):
            for entry in described["tensors"]:
                span = file.span(entry["key"], 0, entry["numel"])
                if span is None:
                    return f"{parcel.path} lacks {entry['key']!r}"
                if _sums(content[span[1] : span[2]], info.block_bytes) != entry["crc"]:
                    return f"{parcel.path}: the checksum of {entry['key']!r} differs"
    finally:
        file.close()
    return None


def _sums(content: Tensor, block_bytes: int) -> str:
    return "".join(
        crc32c(content[begin : begin + block_bytes]) for begin in range(0, len(content), block_bytes)
    )


def _sizes(mine: Parcel) -> bytes:
    described: Mapping[str, Any] = {
        "file": mine.path.name,
        "num_bytes": mine.path.stat().st_size,
        "fragment": len(mine.fragment),
    }
    return json.dumps(described).encode()


def _parts(content: Tensor) -> Iterator[Tensor]:
    yield from content.split(CHUNK_BYTES)


@contextmanager
def _mapped(paths: Sequence[Path], *, write: bool) -> Iterator[list[Tensor]]:
    """The contents of files as 1-D uint8 tensors, which must not be used after the block."""
    contents = []
    for path in paths:
        with path.open("r+b" if write else "rb") as file:
            access = mmap.ACCESS_WRITE if write else mmap.ACCESS_COPY
            contents.append(torch.frombuffer(mmap.mmap(file.fileno(), 0, access=access), dtype=torch.uint8))
    yield contents
