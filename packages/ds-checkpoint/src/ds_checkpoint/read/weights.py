"""Weights that somebody stored, read tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ds_checkpoint import deepspeed
from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format import folder
from ds_checkpoint.format.datafile import DTYPES
from ds_checkpoint.read import opening

Weights = Mapping[str, Callable[[], Tensor]]
"""Name in the model -> what reads the value, on the CPU."""

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")


@contextlib.contextmanager
def open_weights(
    where: str | os.PathLike[str] | Mapping[str, object], base_dir: str = ""
) -> Iterator[Weights]:
    """What is stored at a place: one of our checkpoints or of DeepSpeed's, a folder in Hugging Face's layout, a file of
    safetensors or torch, a JSON file with "checkpoints": [files], or its content.

    Args:
        base_dir: where relative names of files begin; default beside the JSON file.

    Raises:
        FileNotFoundError: there is nothing; says what was looked for.
        CheckpointError: it is damaged, or no such thing.
    """
    if isinstance(where, Mapping):
        yield _of_files(_listed(where, Path(base_dir or str(where.get("base_dir") or "."))))
        return
    path = Path(base_dir) / where
    if path.is_file() and path.suffix == ".json" and not path.name.endswith(".index.json"):
        listed = json.loads(path.read_text(encoding="utf-8"))
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
            f"{path} has no weights: looked for a checkpoint, {', '.join(_INDEXES)} and {', '.join(_SINGLE)}"
        )


def _listed(content: Mapping[str, object], base: Path) -> list[Path]:
    files = content.get("checkpoints")
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise CheckpointError(
            'a list of weights is {"checkpoints": ["file", ...]}: layers that were cut are not read'
        )
    return [base / file for file in files]


def _of_index(index: Path) -> list[Path]:
    files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [index.parent / file for file in sorted(set(files))]


def _of_files(files: Iterable[Path]) -> Weights:
    found: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is named among the weights, and is not there")
        found |= _safetensors(file) if file.suffix == ".safetensors" else _torch(file)
    return found


def _torch(file: Path) -> dict[str, Callable[[], Tensor]]:
    """Mapped into memory; no pickle is executed."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    return {name: lambda value=value: value for name, value in content.items() if isinstance(value, Tensor)}  # type: ignore[misc]


def _safetensors(file: Path) -> dict[str, Callable[[], Tensor]]:
    size = file.stat().st_size
    raw = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    try:
        start = 8 + int.from_bytes(bytes(raw[:8].tolist()), "little")
        header = json.loads(bytes(raw[8:start].tolist()))
        header.pop("__metadata__", None)
        places: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {}
        for name, entry in header.items():
            first, last = map(int, entry["data_offsets"])
            places[name] = (DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])), first, last)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: it is no file of safetensors") from error
    for name, (dtype, shape, first, last) in places.items():
        if last - first != math.prod(shape) * dtype.itemsize or not 0 <= first <= last <= size - start:
            raise CheckpointError(f"{file} is damaged: {name!r} does not lie inside it")

    def reader(dtype: torch.dtype, shape: tuple[int, ...], first: int, last: int) -> Callable[[], Tensor]:
        # Copied, for what follows may begin at any byte, and a view of it in another dtype may not.
        return lambda: raw[start + first : start + last].clone().view(dtype).reshape(shape)

    return {name: reader(*place) for name, place in places.items()}
