"""Reads stored weights of several formats, tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_checkpoint import deepspeed
from ds_checkpoint.deepspeed import inert
from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format import folder
from ds_checkpoint.format.datafile import DTYPES
from ds_checkpoint.read import opening

Weights = Mapping[str, Callable[[], Tensor]]
"""Name in the model -> function that reads the value, on the CPU."""

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")


@contextlib.contextmanager
def open_weights(
    where: str | os.PathLike[str] | Mapping[str, object], base_dir: str = ""
) -> Iterator[Weights]:
    """Opens stored weights: a checkpoint of ours or of DeepSpeed, a folder in Hugging Face's layout, a safetensors or
    torch file, a JSON file with "checkpoints": [files], or its contents.

    Args:
        base_dir: directory of relative file names. Default: that of the JSON file.

    Raises:
        FileNotFoundError: there are no weights. The message says what was looked for.
        CheckpointError: the weights are damaged, or in none of these formats.
    """
    if isinstance(where, Mapping):
        yield _of_files(_listed(where, Path(base_dir or str(where.get("base_dir") or "."))))
        return
    path = Path(base_dir) / where
    if path.is_file() and path.suffix == ".json" and not path.name.endswith(".index.json"):
        listed = _json(path)
        yield _of_files(_listed(listed, Path(base_dir or str(listed.get("base_dir") or path.parent))))
    elif path.is_file():
        yield _of_files(_of_index(path) if path.suffix == ".json" else [path])
    elif folder.is_complete(path) or folder.complete(path) or deepspeed.locate(path, None) is not None:
        with opening.open_checkpoint(path) as checkpoint:
            yield {
                name: lambda fqn=fqn: opening.tensor(checkpoint, fqn, None)  # type: ignore[misc]
                for name, fqn in opening.names(checkpoint)
            }
    else:
        for name in (*_INDEXES, *_SINGLE):
            if (path / name).is_file():
                yield _of_files(_of_index(path / name) if name in _INDEXES else [path / name])
                return
        raise FileNotFoundError(
            f"{path} contains no weights: looked for a checkpoint, {', '.join(_INDEXES)} and {', '.join(_SINGLE)}"
        )


def _listed(content: Mapping[str, object], base: Path) -> list[Path]:
    files = content.get("checkpoints")
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise CheckpointError(
            'a list of weights is {"checkpoints": ["file", ...]}: layers that were split for tensor parallelism '
            "are not supported"
        )
    return [base / file for file in files]


def _of_index(index: Path) -> list[Path]:
    content = _json(index)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) and name for name in names.values()):
        raise CheckpointError(
            f"{index} is damaged: its weight_map must map names of tensors to names of files"
        )
    return [index.parent / file for file in sorted(set(names.values()))]


def _json(file: Path) -> dict[str, Any]:
    """Reads the object in a JSON file of unknown origin."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a list of weights: it contains a {type(content).__name__}")
    return content


def _of_files(files: Iterable[Path]) -> Weights:
    readers: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is in the list of weights, but does not exist")
        stored = _safetensors(file) if file.suffix == ".safetensors" else _torch(file)
        if twice := sorted(readers.keys() & stored.keys()):
            raise CheckpointError(
                f"{file} has {twice[0]!r}, which another of the files contains, too: remove one of the files "
                "from the list"
            )
        readers |= stored
    return readers


def _torch(file: Path) -> dict[str, Callable[[], Tensor]]:
    """Opens a torch file, memory-mapped. No pickle is executed."""
    content = inert.read(file)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} contains a {type(content).__name__} instead of a dict of tensors")
    return {
        str(name): lambda value=value: value  # type: ignore[misc]
        for name, value in content.items()
        if isinstance(value, Tensor)
    }


MAX_HEADER_BYTES = 100 << 20
"""The same limit as in the safetensors library."""


def _safetensors(file: Path) -> dict[str, Callable[[], Tensor]]:
    size = file.stat().st_size
    if size < 8:
        raise CheckpointError(f"{file} is not a safetensors file: it has only {size} bytes")
    raw = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    start = 8 + int.from_bytes(bytes(raw[:8].tolist()), "little")
    if start > min(size, 8 + MAX_HEADER_BYTES):
        raise CheckpointError(f"{file} is damaged: it has {size} bytes, and its header claims {start - 8}")
    places = _places(file, bytes(raw[8:start].numpy().tobytes()))
    at = 0
    for name, (dtype, shape, first, last) in sorted(places.items(), key=lambda item: item[1][2:]):
        if last - first != math.prod(shape) * dtype.itemsize or not 0 <= first <= last <= size - start:
            raise CheckpointError(f"{file} is damaged: {name!r} lies outside of the file")
        if first != at:
            wrong = "overlaps the previous tensor" if first < at else "follows a gap"
            raise CheckpointError(f"{file} is damaged: {name!r} {wrong}")
        at = last
    if at != size - start:
        raise CheckpointError(f"{file} is damaged: {size - start - at} bytes belong to no tensor")

    def reader(dtype: torch.dtype, shape: tuple[int, ...], first: int, last: int) -> Callable[[], Tensor]:
        # Copied, because a tensor may begin at any byte, while a view in another dtype must be aligned.
        return lambda: raw[start + first : start + last].clone().view(dtype).reshape(shape)

    return {name: reader(*place) for name, place in places.items()}


_Place = tuple[torch.dtype, tuple[int, ...], int, int]
"""Dtype, shape, first and last byte."""


def _places(file: Path, header: bytes) -> dict[str, _Place]:
    """Returns the position of each tensor, from a header of unknown origin."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("it has a key twice")
        return content

    try:
        content = json.loads(header, object_pairs_hook=unique)
        content.pop("__metadata__", None)
        return {name: _place(entry) for name, entry in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} cannot be read: its header is not a safetensors header ({error})"
        ) from error


def _place(entry: Mapping[str, Any]) -> _Place:
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(n) is int and 0 <= n < 2**63 for n in (first, last, *shape)):
        raise ValueError(f"sizes {shape}, bytes {first} to {last}")
    return DTYPES[entry["dtype"]], shape, first, last
