"""`manifest.json`: the logical tensors of a checkpoint, the position of every piece of them, and all other values.

The file is ordinary JSON, {"crc32c": "xxxxxxxx", "manifest": {...}}. The checksum covers the bytes of the inner
object.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ds_checkpoint.disk.crc import crc32c
from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format import coordinates as mesh
from ds_checkpoint.format.datafile import FileInfo
from ds_checkpoint.format.version_1 import upgraded
from ds_checkpoint.interfaces import Coordinates

NAME = "manifest.json"
FORMAT = "ds-checkpoint"
VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A range of a flattened logical tensor, as one tensor of a data file."""

    file: str
    key: str
    flat_offset: int
    """First element within the logical tensor."""
    numel: int
    crc32c: str
    """Concatenated checksums of its blocks, eight digits each; see [Note: blocks]."""

    @property
    def end(self) -> int:
        return self.flat_offset + self.numel


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One logical tensor: a parameter, a buffer, or a state of a parameter."""

    coordinates: Coordinates = field(default_factory=dict)
    """Which of the tensors of that name it is, where values differ along axes of the mesh."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """Ordered, without gap or overlap."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a manifest."""

    tag: str
    world_size: int
    """Number of ranks that wrote the checkpoint."""
    saved_at_s: float
    """Seconds since 1970, by the clock of rank 0."""
    sequence: int = 0
    """See `Age.sequence`."""
    named_latest: bool = True
    """Whether the save made `latest` name this checkpoint."""
    files: Mapping[str, FileInfo]
    tensors: Mapping[str, Mapping[str, tuple[Entry, ...]]]
    """Name of parameter or buffer -> "param", "buffer" or name of an optimizer state -> tensor; several where their
    values differ along axes of the mesh of ranks, each with its coordinates."""
    blobs: Mapping[str, Entry] = field(default_factory=dict)
    """Tensors that belong to no parameter, such as those of random generators and of the user. Each has one piece."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Counters, schedule, optimizer options, config, ...: JSON."""

    @property
    def num_tensors(self) -> int:
        return sum(1 for _ in self.entries())

    def entries(self) -> Iterator[tuple[str, str, Entry]]:
        """Name, state and tensor of all that belongs to a parameter or buffer."""
        for fqn, states in self.tensors.items():
            for state, entries in states.items():
                for entry in entries:
                    yield fqn, state, entry


def check_pieces(name: str, shape: tuple[int, ...], pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Returns the pieces in order.

    Raises:
        CheckpointError: the pieces do not cover every element exactly once.
    """
    ordered = tuple(sorted(pieces, key=lambda p: (p.flat_offset, p.numel)))
    at = 0
    for piece in ordered:
        if piece.flat_offset != at:
            kind = "appear twice" if piece.flat_offset < at else "are missing"
            raise CheckpointError(
                f"elements {min(at, piece.flat_offset)} to {max(at, piece.flat_offset)} of {name} {kind}"
            )
        at = piece.end
    if at != math.prod(shape):
        raise CheckpointError(f"{name} has {math.prod(shape)} elements, but its pieces have {at}")
    return ordered


def dump(manifest: Manifest) -> bytes:
    """Returns the bytes of the file, from which `load` makes an equal manifest."""
    body = {
        "format": FORMAT,
        "version": VERSION,
        "tag": manifest.tag,
        "world_size": manifest.world_size,
        "saved_at_s": manifest.saved_at_s,
        "sequence": manifest.sequence,
        "named_latest": manifest.named_latest,
        "values": dict(manifest.values),
        "files": {name: vars(info) for name, info in manifest.files.items()},
        "tensors": {
            fqn: {state: [_dump_entry(entry) for entry in entries] for state, entries in states.items()}
            for fqn, states in manifest.tensors.items()
        },
        "blobs": {name: _dump_entry(entry) for name, entry in manifest.blobs.items()},
    }
    inner = json.dumps(body, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    return _opening(inner) + inner + _CLOSING


_CLOSING = b"}\n"


def _opening(inner: bytes) -> bytes:
    return b'{"crc32c": "%s", "manifest": ' % crc32c(inner).encode()


def _dump_entry(entry: Entry) -> dict[str, Any]:
    return {
        "dtype": str(entry.dtype).removeprefix("torch."),
        "shape": list(entry.shape),
        **({"coordinates": mesh.merged(entry.coordinates)} if entry.coordinates else {}),
        "pieces": [vars(piece) for piece in entry.pieces],
    }


def load(raw: bytes, path: Path) -> Manifest:
    """Verifies and parses the bytes of a manifest.

    Raises:
        CheckpointError: a byte was changed, or the format is newer than this package.
    """
    length = len(_opening(b""))
    inner = raw[length : -len(_CLOSING)]
    if len(raw) <= length or raw != _opening(inner) + inner + _CLOSING:
        raise CheckpointError(f"{path} is damaged: its checksum does not match its contents")
    try:
        return _read(json.loads(inner), path)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a manifest, although its checksum matches ({type(error).__name__}: {error})"
        ) from error


def _read(body: dict[str, Any], path: Path) -> Manifest:
    if body["format"] != FORMAT or body["version"] > VERSION:
        raise CheckpointError(
            f"{path} has format {body['format']} version {body['version']}, this ds-checkpoint reads {FORMAT} up "
            f"to version {VERSION}: install a newer ds-checkpoint"
        )
    if body["version"] == 1:
        body = upgraded(body)
    return Manifest(
        tag=body["tag"],
        world_size=body["world_size"],
        saved_at_s=body["saved_at_s"],
        sequence=body.get("sequence", 0),
        named_latest=body.get("named_latest", True),
        values=body["values"],
        files={name: FileInfo(**info) for name, info in body["files"].items()},
        tensors={
            fqn: {
                state: tuple(_load_entry(entry, f"{state} of {fqn!r}") for entry in entries)
                for state, entries in states.items()
            }
            for fqn, states in body["tensors"].items()
        },
        blobs={name: _load_entry(entry, name) for name, entry in body["blobs"].items()},
    )


PEEK_BYTES = 2048
"""Number of bytes that `peek` needs from the beginning of a manifest: a tag has at most 255 bytes."""
_PEEK = re.compile(rb'"saved_at_s":([0-9.]+),(?:"sequence":(\d{1,18}),)?"named_latest":(true|false)')


@dataclass(frozen=True, order=True)
class Age:
    """When a checkpoint was saved; a later one compares as larger."""

    sequence: int
    """Each save into a directory uses one more than the largest in it. Unlike a clock, it is never set back."""
    saved_at_s: float
    """Orders checkpoints from before sequence numbers existed, whose sequence is 0."""


def peek(raw: bytes) -> tuple[Age, bool] | None:
    """Returns age and `named_latest` from the beginning of a manifest, without verification; None if they are
    missing.
    """
    match = _PEEK.search(raw)
    if match is None:
        return None
    try:
        age = Age(int(match[2] or 0), float(match[1]))
    except ValueError:
        return None
    return age, match[3] == b"true"


def _load_entry(entry: dict[str, Any], name: str) -> Entry:
    shape = tuple(entry["shape"])
    pieces = check_pieces(name, shape, (Piece(**piece) for piece in entry["pieces"]))
    return Entry(
        dtype=getattr(torch, entry["dtype"]),
        shape=shape,
        pieces=pieces,
        coordinates=mesh.merged(entry.get("coordinates", {})),
    )
