"""Converts a checkpoint to one state dict, to safetensors or torch files, or to our own format."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ds_checkpoint.disk import synced
from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format import datafile
from ds_checkpoint.format.datafile import Item
from ds_checkpoint.format.model_config import MODEL_CONFIG
from ds_checkpoint.format.records import Record
from ds_checkpoint.read.checkpoint import Checkpoint
from ds_checkpoint.read.opening import names, open_checkpoint, tensor
from ds_checkpoint.write.writer import Content, write

Layout = Literal["safetensors", "pt"]
_STEMS: Mapping[str, tuple[str, str]] = {
    "safetensors": ("model", "safetensors"),
    "pt": ("pytorch_model", "bin"),
}
"""File names that Hugging Face's loaders look for."""


def state_dict(
    path: str | os.PathLike[str],
    tag: str | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    exclude_frozen: bool = False,
) -> dict[str, Tensor]:
    """Returns the whole model of a checkpoint on the CPU: name -> tensor. Shared parameters are one tensor under all
    their names.

    Args:
        dtype: dtype of floating-point parameters. None: as stored.

    Raises:
        FileNotFoundError, CheckpointError: as `open_checkpoint`; also if the result would be empty.
    """
    with open_checkpoint(path, tag) as checkpoint:
        made: dict[str, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        for name, fqn in names(checkpoint, exclude_frozen=exclude_frozen):
            if fqn not in made:
                made[fqn] = tensor(checkpoint, fqn, dtype)
            tensors[name] = made[fqn]
    if not tensors:
        raise CheckpointError(f"{path} contains no parameters to return")
    return tensors


def load_into(model: nn.Module, path: str | os.PathLike[str], tag: str | None = None) -> nn.Module:
    """Loads the fp32 values of a checkpoint into an ordinary model on the CPU, cast to the model's dtypes.

    Raises:
        RuntimeError: names or shapes differ (from torch's strict `load_state_dict`).
    """
    model.load_state_dict(state_dict(path, tag), strict=True)
    return model


@dataclass(frozen=True)
class Exported:
    """The result of `export`."""

    files: tuple[Path, ...]
    num_tensors: int
    num_bytes: int


def export(
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    tag: str | None = None,
    *,
    layout: Layout = "safetensors",
    dtype: torch.dtype | None = torch.float32,
    max_shard_bytes: int = 5 * 10**9,
    exclude_frozen: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Writes the model in Hugging Face's layout: one file, or shards and an index, and config.json if the model has a
    configuration. At most one shard is held in memory. Several processes may export at the same time: each file
    appears atomically, with the same content from each.

    Args:
        dtype: dtype of floating-point parameters. None: as stored.
        overwrite: replace files of these names, and remove other files of an earlier export.
        progress: called with (bytes written, total bytes) after every tensor.

    Raises:
        FileExistsError: a file of that name exists already. Nothing was written. FileNotFoundError, CheckpointError:
        as `open_checkpoint`.
    """
    target = Path(out_dir)
    with open_checkpoint(path, tag) as checkpoint:
        # A tensor has only one name in safetensors; the model ties the others when it loads.
        wanted = dict(names(checkpoint, exclude_frozen=exclude_frozen))
        stored = {name: fqn for name, fqn in wanted.items() if name == fqn}
        if not stored:
            raise CheckpointError(f"{checkpoint.path} contains no parameters to export")
        sizes = {fqn: _num_bytes(checkpoint, fqn, dtype) for fqn in stored}
        shards = _shards(sizes, max_shard_bytes)
        stem, suffix = _STEMS[layout]
        files = _file_names(stem, suffix, len(shards))
        target.mkdir(parents=True, exist_ok=True)
        index = target / f"{stem}.{suffix}.index.json"
        for there in [] if overwrite else [*(target / file for file in files), index]:
            if there.exists():
                raise FileExistsError(
                    f"{there} exists: export into another directory, or overwrite it "
                    "(`ds checkpoint export --overwrite`, overwrite=True)"
                )
        total, done = sum(sizes.values()), 0
        weight_map: dict[str, str] = {}
        for shard, file in zip(shards, files, strict=True):
            made = {}
            for fqn in shard:
                made[fqn] = tensor(checkpoint, fqn, dtype)
                done += sizes[fqn]
                progress(done, total)
            if layout == "pt":
                made |= {name: made[fqn] for name, fqn in wanted.items() if fqn in made}
            weight_map |= dict.fromkeys(made, file)
            _write(target / file, made, layout)
        if len(shards) > 1:
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_text(index, json.dumps(content, indent=2))
        if overwrite:
            _remove_others(target, stem, suffix, {*files, *([index.name] if len(shards) > 1 else [])})
        config = checkpoint.manifest.values.get(MODEL_CONFIG)
        if config is not None and (overwrite or not (target / "config.json").exists()):
            _write_text(target / "config.json", config)
    return Exported(tuple(target / file for file in files), len(stored), total)


def convert(
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    tag: str | None = None,
    out_tag: str | None = None,
) -> str:
    """Copies a checkpoint of ours or of DeepSpeed into our format: parameters, states, counters, schedule, client
    state.

    Returns:
        The path of the new checkpoint.
    """
    with open_checkpoint(path, tag) as checkpoint:
        manifest = checkpoint.manifest
        records = [
            Record(
                fqn,
                state,
                entry.shape,
                0,
                checkpoint.tensor(fqn, state, entry.coordinates).reshape(-1),
                entry.coordinates,
            )
            for fqn, state, entry in manifest.entries()
        ]
        values = {key: value for key, value in manifest.values.items() if not key.startswith("rng/")}
        blobs = {name: checkpoint.blob(name) for name in manifest.blobs if not name.startswith("rng/")}
        if manifest.values.keys() != values.keys():
            warnings.warn(
                f"{checkpoint.path}: random generators are saved per rank, so they are left out",
                stacklevel=2,
            )
        content = Content(records=records, blobs=blobs, values=values)
        return write(out_dir, out_tag or manifest.tag, lambda: content)


def _num_bytes(checkpoint: Checkpoint, fqn: str, dtype: torch.dtype | None) -> int:
    states = checkpoint.manifest.tensors[fqn]
    (entry,) = states.get("param") or states["buffer"]
    cast = dtype is not None and "param" in states and entry.dtype.is_floating_point
    return math.prod(entry.shape) * (dtype if cast and dtype is not None else entry.dtype).itemsize


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Groups names, in order, into shards of at most `limit` bytes."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _file_names(stem: str, suffix: str, count: int) -> Sequence[str]:
    if count == 1:
        return [f"{stem}.{suffix}"]
    return [f"{stem}-{i:05d}-of-{count:05d}.{suffix}" for i in range(1, count + 1)]


def _remove_others(target: Path, stem: str, suffix: str, kept: set[str]) -> None:
    """Removes files of an earlier export that loaders would take for parts of this one."""
    pattern = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.{suffix}(\.index\.json)?")
    for path in target.iterdir():
        if pattern.fullmatch(path.name) and path.name not in kept:
            path.unlink(missing_ok=True)


def _write(path: Path, tensors: dict[str, Tensor], layout: Layout) -> None:
    with _complete(path) as part:
        if layout == "safetensors":
            items = [
                Item(key=k, data=v.contiguous().view(-1), shape=tuple(v.shape)) for k, v in tensors.items()
            ]
            datafile.write(part, items, kind="pt")
        else:
            with part.open("wb") as file:
                torch.save(dict[str, Any](tensors), file)
                file.flush()
                os.fsync(file.fileno())


def _write_text(path: Path, content: str) -> None:
    with _complete(path) as part:
        synced.write_synced(part, content.encode())


@contextlib.contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """Yields a temporary path, unique to this process, that is renamed to `path` if no error occurs."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        os.replace(part, path)
        synced.sync(path.parent)
    finally:
        part.unlink(missing_ok=True)
