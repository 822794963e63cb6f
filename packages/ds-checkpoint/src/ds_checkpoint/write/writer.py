"""Writes a checkpoint with all ranks: each writes its data file; rank 0 writes the manifest and commits."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_checkpoint.disk import synced
from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format import coordinates as mesh
from ds_checkpoint.format import datafile, folder, manifest
from ds_checkpoint.format.datafile import FileInfo, Item
from ds_checkpoint.format.image import Image
from ds_checkpoint.format.manifest import Entry, Manifest, Piece
from ds_checkpoint.interfaces import ShardRecord
from ds_checkpoint.team import Team
from ds_checkpoint.write import staging as directory_of
from ds_checkpoint.write.staging import Staging


@dataclass(frozen=True, kw_only=True)
class Content:
    """The part of a checkpoint that one rank writes."""

    records: Sequence[ShardRecord]
    """Records of this rank. Over all ranks they contain every element of every logical tensor exactly once."""
    blobs: Mapping[str, Tensor] = field(default_factory=dict)
    """Other tensors. Names must be unique over all ranks."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """JSON values. Keys must be unique over all ranks (rank 0 passes the values that all ranks share)."""
    only_stepped: Callable[[ShardRecord], bool] = lambda record: False
    """Whether only an optimizer step changes a record's tensor. It may then be copied until the next step."""
    image: Image | None = None
    """The image of this rank's file; all tensors are views of it."""


def file_name(rank: int, size: int) -> str:
    """Returns the name of a rank's data file."""
    return f"rank-{rank:05d}-of-{size:05d}.safetensors"


def write(
    root: str | os.PathLike[str],
    tag: str,
    content: Callable[[], Content],
    *,
    keep_last: int | None = None,
    name_latest: bool = True,
    team: Team | None = None,
) -> str:
    """Writes `<root>/<tag>` and makes `latest` name it. All ranks must call it.

    Args:
        content: returns this rank's content; called once. If it raises, the save fails on every rank.
        keep_last: number of checkpoints to keep; older ones are removed.
        name_latest: False leaves `latest` unchanged.
        team: the ranks. Default: those of the default process group.

    Returns:
        The path of the checkpoint.

    Raises:
        CheckpointError: on every rank, if any rank failed. The directory is unchanged.
    """
    team = team or Team()
    directory = Path(root)
    staging = _begin(team, directory, tag, name_latest)
    try:
        path = Path(team.share(os.fsencode(staging.path) if staging is not None else b"").decode())
        fragment, error = _attempt(lambda: write_file(path, team, content()))
        team.settle(error, f"saving {directory / tag}")
        fragments = team.gather(fragment)
        final, error = _attempt(lambda: _commit(staging, fragments, tag) if staging is not None else b"")
        team.settle(error, f"saving {directory / tag}")
    except BaseException:
        if staging is not None:
            staging.abort()
        raise
    if staging is not None and keep_last is not None:
        _prune(directory, keep_last, tag)
    return team.share(final).decode()


def _attempt(action: Callable[[], bytes]) -> tuple[bytes, Exception | None]:
    try:
        return action(), None
    except Exception as error:  # noqa: BLE001 - `settle` raises it again, on every rank
        return b"", error


def _begin(team: Team, root: Path, tag: str, name_latest: bool) -> Staging | None:
    """Checks that all ranks have the same tag, and creates the folder on rank 0."""
    agreed = team.share(tag.encode()).decode()
    error: Exception | None = None
    staging: Staging | None = None
    try:
        if agreed != tag:
            raise ValueError(f"tag {tag!r} here, {agreed!r} on rank 0: pass the same tag on every rank")
        folder.check_tag(tag)
        staging = Staging(root, tag, name_latest=name_latest) if team.first else None
    except (OSError, ValueError) as problem:
        error = problem
    try:
        team.settle(error, f"saving {root / tag}")
    except CheckpointError:
        if staging is not None:
            staging.abort()
        raise
    return staging


def described(content: Content) -> tuple[list[Item], list[dict[str, Any]]]:
    """Returns the items of this rank's file, records first, and the manifest's entry for each."""
    items: list[Item] = []
    tensors: list[dict[str, Any]] = []
    for record in content.records:
        where = mesh.text(record.coordinates)
        key = f"{record.fqn}/{record.state}@{record.flat_offset}" + (f" ({where})" if where else "")
        items.append(Item(key=key, data=record.data))
        tensors.append(
            {
                "fqn": record.fqn,
                "state": record.state,
                "shape": list(record.global_shape),
                "offset": record.flat_offset,
                "coordinates": mesh.merged(record.coordinates),
            }
        )
    for blob_name, tensor in content.blobs.items():
        items.append(Item(key=f"blob/{blob_name}", data=tensor.detach().contiguous().reshape(-1)))
        tensors.append({"blob": blob_name, "shape": list(tensor.shape), "offset": 0})
    return items, tensors


def write_file(path: Path, team: Team, content: Content) -> bytes:
    """Writes this rank's file into the folder `path`, and returns its part of the manifest as JSON, for `merged`."""
    if not path.is_dir():
        raise FileNotFoundError(
            f"rank 0 created {path}, but this rank does not see it: save to a file system that all ranks share"
        )
    name = file_name(team.rank, team.size)
    items, tensors = described(content)
    written = datafile.write(path / name, items, image=content.image)
    for item, entry in zip(items, tensors, strict=True):
        dtype = str(item.data.dtype).removeprefix("torch.")
        entry.update(key=item.key, numel=item.data.numel(), dtype=dtype, crc=written.crc32c[item.key])
    return json.dumps(
        {"file": name, "info": asdict(written.info), "tensors": tensors, "values": dict(content.values)}
    ).encode()


def _commit(staging: Staging, fragments: Sequence[bytes], tag: str) -> bytes:
    """Writes the manifest, and commits the folder."""
    sequence = folder.next_sequence(staging.root)
    whole = merged(fragments, tag, sequence=sequence, names_latest=staging.names_latest)
    synced.write_synced(staging.path / manifest.NAME, manifest.dump(whole))
    return os.fsencode(staging.commit())


def merged(fragments: Sequence[bytes], tag: str, *, sequence: int, names_latest: bool) -> Manifest:
    """Merges the parts of the manifest that `write_file` returned on all ranks.

    Raises:
        CheckpointError: they do not contain every element exactly once.
    """
    by_tensor: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    values: dict[str, Any] = {}
    files: dict[str, FileInfo] = {}
    for fragment in map(json.loads, fragments):
        files[fragment["file"]] = FileInfo(**fragment["info"])
        values.update(fragment["values"])
        for entry in fragment["tensors"]:
            entry["file"] = fragment["file"]
            by_tensor.setdefault(_tensor_of(entry), []).append(entry)
    tensors: dict[str, dict[str, tuple[Entry, ...]]] = {}
    blobs: dict[str, Entry] = {}
    for (fqn, name, _), entries in by_tensor.items():
        if "blob" in entries[0]:
            blobs[name] = _entry(name, entries)
        else:
            states = tensors.setdefault(fqn, {})
            states[name] = (*states.get(name, ()), _entry(f"{name} of {fqn!r}", entries))
    return Manifest(
        tag=tag,
        world_size=len(fragments),
        saved_at_s=time.time(),
        sequence=sequence,
        named_latest=names_latest,
        files=files,
        tensors=tensors,
        blobs=blobs,
        values=values,
    )


def _tensor_of(entry: Mapping[str, Any]) -> tuple[str, str, tuple[tuple[str, int, int], ...]]:
    """Which logical tensor or blob a piece belongs to."""
    if "blob" in entry:
        return "", entry["blob"], ()
    return entry["fqn"], entry["state"], mesh.hashable(entry["coordinates"])


def _entry(name: str, entries: Sequence[dict[str, Any]]) -> Entry:
    kinds = {(entry["dtype"], tuple(entry["shape"])) for entry in entries}
    if len(kinds) > 1:
        raise CheckpointError(f"ranks disagree about {name}: {sorted(map(str, kinds))}")
    dtype, shape = kinds.pop()
    coordinates = mesh.merged(entries[0].get("coordinates", {}))
    name += f" ({mesh.text(coordinates)})" if coordinates else ""
    pieces = [
        Piece(file=e["file"], key=e["key"], flat_offset=e["offset"], numel=e["numel"], crc32c=e["crc"])
        for e in entries
    ]
    checked = manifest.check_pieces(name, shape, pieces)
    return Entry(dtype=getattr(torch, dtype), shape=shape, pieces=checked, coordinates=coordinates)


def _prune(root: Path, keep_last: int, tag: str) -> None:
    """Removes old checkpoints. A failure only warns, because the new checkpoint is complete."""
    try:
        directory_of.prune(root, keep_last, tag)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait for this one
        warnings.warn(f"old checkpoints in {root} could not be removed: {error}", stacklevel=3)
