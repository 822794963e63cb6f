"""Finds and opens a checkpoint of ours or of DeepSpeed, and lists the names of its tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ds_checkpoint import deepspeed
from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format import coordinates as mesh
from ds_checkpoint.format import folder
from ds_checkpoint.format.model_part import refuse_parts
from ds_checkpoint.read.checkpoint import Checkpoint


def locate(root: Path, tag: str | None) -> Path:
    """Returns the folder of a checkpoint in `root`: one of ours, or else one of DeepSpeed.

    Raises:
        FileNotFoundError: there is none. The message lists the contents of `root`.
    """
    foreign = None if folder.complete(root) else deepspeed.locate(root, tag)
    return foreign if foreign is not None else folder.find(root, tag)


def locate_any(path: Path, tag: str | None) -> Path:
    """As `locate`, but `path` may also be the folder of one checkpoint."""
    return path if tag is None and folder.is_complete(path) else locate(path, tag)


def open_at(path: Path, order: Sequence[Sequence[str]] | None = None) -> Checkpoint:
    """Opens the folder that `locate` returned; `order` as for `DeepSpeedCheckpoint`."""
    return Checkpoint(path) if folder.is_complete(path) else deepspeed.DeepSpeedCheckpoint(path, order)


def open_checkpoint(path: str | os.PathLike[str], tag: str | None = None) -> Checkpoint:
    """Opens a checkpoint for reading, ours or DeepSpeed's (stages 0 to 3, universal). No pickle is executed.

    Args:
        path: the directory that was passed to `save_checkpoint`, or the folder of one checkpoint.
        tag: name of the checkpoint. Default: the one that `latest` names.

    Raises:
        FileNotFoundError: there is none. The message says what was looked for.
        CheckpointError: the checkpoint is damaged or incomplete.
    """
    return open_at(locate_any(Path(path), tag))


def names(checkpoint: Checkpoint, *, exclude_frozen: bool = False) -> Iterator[tuple[str, str]]:
    """Returns name in a state dict -> name in the checkpoint, for parameters, persistent buffers and further names of
    shared parameters.

    Raises:
        CheckpointError: values under one name differ along axes of the mesh of ranks.
    """
    refuse_parts(checkpoint)
    _refuse_several(checkpoint)
    values = checkpoint.manifest.values
    frozen = set(values.get("frozen") or ()) if exclude_frozen else set()
    kept = {
        fqn
        for fqn, states in checkpoint.manifest.tensors.items()
        if fqn not in frozen and ("param" in states or "buffer" in states)
    }
    yield from ((fqn, fqn) for fqn in checkpoint.manifest.tensors if fqn in kept)
    yield from ((other, fqn) for other, fqn in (values.get("tied") or {}).items() if fqn in kept)


def _refuse_several(checkpoint: Checkpoint) -> None:
    for fqn, state, entry in checkpoint.manifest.entries():
        if entry.coordinates:
            raise CheckpointError(
                f"{checkpoint.path} has several values under one name: {state} of {fqn!r} is there for "
                f"{mesh.text(entry.coordinates)}, and only the model knows how these make a whole. Load it into the "
                f"model on as many ranks, or read one by one: checkpoint.tensor({fqn!r}, {state!r}, "
                f"{mesh.merged(entry.coordinates)})"
            )


def tensor(checkpoint: Checkpoint, fqn: str, dtype: torch.dtype | None) -> Tensor:
    """Returns a stored parameter in `dtype`, or a buffer unchanged."""
    if "param" in checkpoint.manifest.tensors[fqn]:
        value = checkpoint.tensor(fqn, "param")
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value
    return checkpoint.tensor(fqn, "buffer")
