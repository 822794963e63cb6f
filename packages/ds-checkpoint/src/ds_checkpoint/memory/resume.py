"""Which state a start continues from: the newer one of memory and disk."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ds_checkpoint.errors import CheckpointError, LostRanksError
from ds_checkpoint.format import folder
from ds_checkpoint.memory.copies import MemoryCopies
from ds_checkpoint.memory.placement import Generation
from ds_checkpoint.read import opening
from ds_checkpoint.read.checkpoint import Checkpoint
from ds_checkpoint.team import Team

T = TypeVar("T")


def load_newest(
    root: Path,
    copies: MemoryCopies | None,
    team: Team,
    open_at: Callable[[Path], Checkpoint],
    restore: Callable[[Checkpoint], T],
) -> tuple[Path, T] | None:
    """Opens the newest checkpoint, and calls `restore` with it. All ranks must call it.

    Args:
        root: the directory of checkpoints on the disk, which need not exist.
        copies: those in memory, if the job keeps any.
        open_at: opens the folder of a checkpoint on the disk.
        restore: loads the checkpoint. If what hosts keep in memory is damaged, it raises CheckpointError on every rank,
            and is called again with the checkpoint on the disk, if there is one.

    Returns:
        The path of the checkpoint, and what `restore` returned; None if there is no checkpoint.
    """
    doing = f"loading from {root}"
    path, saved_at_s = json.loads(team.by_first(doing, lambda: json.dumps(_on_disk(root))))
    copy = copies.newest() if copies is not None else None
    if copies is not None and copy is not None and copy.saved_at_s >= saved_at_s:
        try:
            return _from_memory(copies, copy, restore)
        except LostRanksError:
            raise
        except CheckpointError as error:
            if path is None:
                raise
            if team.first:
                warnings.warn(f"{copy.name} in memory cannot be loaded, {path} is: {error}", stacklevel=3)
    if path is None:
        return None
    with team.together(f"loading {path}", lambda: open_at(Path(path))) as checkpoint:
        return Path(path), restore(checkpoint)


def _from_memory(
    copies: MemoryCopies, copy: Generation, restore: Callable[[Checkpoint], T]
) -> tuple[Path, T]:
    with copies.open(copy) as checkpoint:
        return checkpoint.path, restore(checkpoint)


def _on_disk(root: Path) -> tuple[str | None, float]:
    """Returns the checkpoint that a load would use, and when it was saved; (None, 0.0) if there is none.

    The time of one that DeepSpeed wrote is unknown, so that any copy is newer: the job has begun from it.
    """
    try:
        path = opening.locate_any(root, None)
    except FileNotFoundError:
        return None, 0.0
    try:
        return str(path), folder.read_manifest(path).saved_at_s if folder.is_complete(path) else 0.0
    except CheckpointError:  # damaged: only a load without copies needs to know
        return str(path), 0.0
