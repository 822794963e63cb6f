"""Reading files in the memory of other hosts, in any order, while these read, too.

Each rank serves the files that its host keeps, in a thread, and reads in its own threads. A request and its answer are
messages between two ranks, with tags of their own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ds_checkpoint.disk.buffers import BUFFER_BYTES, Bytes
from ds_checkpoint.disk.infile import InFile
from ds_checkpoint.team import Team

_REQUEST, _ANSWER = 1, 2
_DONE = -1
"""In place of the number of a file: the sender will request nothing more."""


class FileServer:
    """Answers requests of all other ranks, and sends those of this one. All ranks must create and close it."""

    def __init__(self, team: Team, folder: Path, files: Sequence[str]) -> None:
        """
        Args:
            folder: contains those of the files that this rank serves.
            files: names of all files, the same on all ranks. Requests contain their numbers.
        """
        self._team = team
        # A group of its own: nobody else receives in it from any rank.
        self._group = dist.new_group(backend="gloo") if team.size > 1 else None
        self._folder = folder
        self._files = files
        self._one = threading.Lock()  # answers carry no number, so this rank has one request at a time
        self._others = [rank for rank in range(team.size) if rank != team.rank]
        self._thread = threading.Thread(target=self._serve, name="ds-checkpoint-serve", daemon=True)
        self._thread.start()

    def fetch(self, server: int, file: int, begin: int, room: Bytes) -> None:
        """Fills `room` from byte `begin` of a file that another rank serves.

        Raises:
            OSError: the rank does not answer.
        """
        with self._one:
            try:
                self._request(server, file, begin, room.nbytes)
                dist.recv(torch.from_numpy(room), src=server, group=self._group, tag=_ANSWER)
            except RuntimeError as error:
                raise OSError(5, f"rank {server} does not answer: {str(error).splitlines()[0]}") from error

    def close(self) -> None:
        """Returns when no rank will request anything more. Safe to call twice.

        Raises:
            LostRanksError: a rank is gone.
        """
        if self._group is None:
            return
        for rank in self._others:
            with suppress(RuntimeError):
                self._request(rank, _DONE, 0, 0)
        self._team.watch(self._thread.join)
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _request(self, server: int, file: int, begin: int, num_bytes: int) -> None:
        fields = torch.tensor([file, begin, num_bytes], dtype=torch.int64)
        dist.send(fields, dst=server, group=self._group, tag=_REQUEST)

    def _serve(self) -> None:
        """Runs in the thread."""
        left = len(self._others)
        fields = torch.empty(3, dtype=torch.int64)
        with suppress(
            RuntimeError
        ):  # a rank is gone: its own error, or that of whoever waits for it, says so
            while left:
                source = dist.recv(fields, src=None, group=self._group, tag=_REQUEST)
                file, begin, num_bytes = fields.tolist()
                if file == _DONE:
                    left -= 1
                else:
                    answer = torch.from_numpy(self._read(self._folder / self._files[file], begin, num_bytes))
                    dist.send(answer, dst=source, group=self._group, tag=_ANSWER)

    def _read(self, path: Path, begin: int, num_bytes: int) -> Bytes:
        """Bytes of a file. What cannot be read is zero: the reader's checksums show it, and it asks another host."""
        content = np.zeros(num_bytes, dtype=np.uint8)
        with suppress(OSError), path.open("rb") as file:
            os.preadv(file.fileno(), [content.data], begin)
        return content


class RemoteFile(InFile):
    """A file in the memory of another host."""

    def __init__(self, server: FileServer, rank: int, number: int, num_bytes: int) -> None:
        """
        Args:
            rank: the rank that serves it.
            number: of the file.
        """
        self._server = server
        self._rank = rank
        self._number = number
        self.num_bytes = num_bytes

    def rest(self) -> None:
        """Nothing is open."""

    def close(self) -> None:
        """Nothing is open."""

    def read(self, begin: int, room: Bytes, *, past_cache: bool = False) -> int:
        """As `InFile.read`."""
        size = max(0, min(room.nbytes, self.num_bytes - begin))
        for at in range(0, size, BUFFER_BYTES):
            part = room[at : min(at + BUFFER_BYTES, size)]
            self._server.fetch(self._rank, self._number, begin + at, part)
        return size
