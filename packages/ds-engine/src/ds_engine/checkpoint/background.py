"""Saving while training goes on: a copy of the state is taken at once, and a thread writes it.

Memory is bounded: there is one copy, its buffers are used again, and a save waits for the one before. A crash at any
moment leaves what a crash in an ordinary save leaves: the checkpoint is complete or absent.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ds_zero
from ds_engine.checkpoint.errors import CheckpointError
from ds_engine.checkpoint.team import Team
from ds_engine.checkpoint.write import Content, ShardRecord, write


class BackgroundSaver:
    """Writes one checkpoint at a time beside training. Every rank calls each method alike."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say`: tells a failure the moment it happens."""
        self._say = say
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._buffers: dict[tuple[str, str, int], Tensor] = {}
        self._group: dist.ProcessGroup | None = None

    def save(self, root: Path, tag: str, content: Callable[[], Content], **options: Any) -> str:
        """Take the copy, start writing, and return the path that the checkpoint will have.

        A failure of the save before is a warning: training goes on, and the last good checkpoint is there.

        Raises:
            CheckpointError: on every rank, if any could not take its copy.
        """
        try:
            self.wait()
        except CheckpointError as error:
            warnings.warn(f"the checkpoint before was not written: {error}", stacklevel=5)
        copy: Content | None = None
        failure: Exception | None = None
        try:
            copy = self._copied(content())
        except Exception as error:  # noqa: BLE001 - `settle` raises it on every rank
            failure = error
        Team().settle(failure, f"saving {root / tag}")
        taken = copy
        assert taken is not None
        # A group of its own: collectives of two threads in one group would meet each other.
        if self._group is None and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        team = Team(self._group)

        def work() -> None:
            try:
                write(root, tag, lambda: taken, team=team, **options)
            except Exception as error:  # noqa: BLE001 - raised by `wait`
                self._failure = error
                if team.first:
                    self._say(f"saving {root / tag} in the background failed, training goes on: {error}")

        # Not a daemon: a process that ends in good order ends after its last checkpoint is complete.
        self._thread = threading.Thread(target=work, name="ds-checkpoint")
        self._thread.start()
        return str(root / tag)

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            CheckpointError: what was being written is not there, and why.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if isinstance(failure, CheckpointError):
            raise failure
        if failure is not None:
            raise CheckpointError(f"{type(failure).__name__}: {failure}") from failure

    def close(self) -> None:
        """Wait, and give buffers and group back; a failure that nobody asked for was told when it happened."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._buffers.clear()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _copied(self, content: Content) -> Content:
        copies: dict[tuple[str, str, int], Tensor] = {}
        records: list[ShardRecord] = []
        for record in content.records:
            key = (record.fqn, record.state, record.flat_offset)
            data = record.data.detach()
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != data.shape or buffer.dtype != data.dtype:
                pinned = data.device.type != "cpu"
                buffer = torch.empty(data.shape, dtype=data.dtype, pin_memory=pinned)
            copies[key] = buffer.copy_(data, non_blocking=True)
            records.append(
                ds_zero.ShardRecord(record.fqn, record.state, record.global_shape, record.flat_offset, buffer)
            )
        if any(record.data.device.type != "cpu" for record in content.records):
            torch.accelerator.synchronize()
        self._buffers = copies  # what this save does not have is not kept
        blobs = {name: tensor.detach().clone().cpu() for name, tensor in content.blobs.items()}
        return Content(records=records, blobs=blobs, values=content.values)
