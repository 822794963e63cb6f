"""A checkpoint whose files are in the memory of several hosts, for the ordinary readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ds_checkpoint.disk.infile import InFile
from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format.datafile import DataFile
from ds_checkpoint.format.manifest import Manifest, Piece
from ds_checkpoint.memory.serving import FileServer, RemoteFile
from ds_checkpoint.read.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a file can be read."""

    rank: int | None
    """Rank that serves it; None: it is in this host's own folder."""
    host: str
    """Name of the host that keeps it."""


class MemoryCheckpoint(Checkpoint):
    """Reads each file from this host's memory, or from another host that keeps it. If what one host keeps is damaged,
    it reads the copy of the next one.
    """

    def __init__(
        self, path: Path, stored: Manifest, sources: Mapping[str, Sequence[Source]], server: FileServer
    ) -> None:
        """
        Args:
            path: the folder of the checkpoint on this host, which need not exist.
            sources: file -> where it is, in the order in which these are tried.
        """
        super().__init__(path, stored)
        self._sources = {name: list(where) for name, where in sources.items()}
        self._server = server
        self._numbers = {name: number for number, name in enumerate(sorted(stored.files))}
        self._retired: list[DataFile] = []

    def close(self) -> None:
        """Closes the files, and waits until the other ranks have read what they need of this host. All ranks must
        call it.
        """
        for file in self._retired:
            file.close()
        super().close()
        self._server.close()

    def _file(self, name: str) -> DataFile:
        problems: list[str] = []
        while name not in self._files:
            if not self._sources[name]:
                raise CheckpointError("; ".join(problems) or f"{name} is damaged on every host that keeps it")
            try:
                self._files[name] = self._opened(name, self._sources[name][0])
            except (CheckpointError, OSError) as error:
                problems.append(f"{error} (in the memory of {self._sources[name].pop(0).host})")
        return self._files[name]

    def _opened(self, name: str, source: Source) -> DataFile:
        info = self.manifest.files[name]
        remote: InFile | None = None
        if source.rank is not None:
            remote = RemoteFile(self._server, source.rank, self._numbers[name], info.num_bytes)
        return DataFile(self.path / name, info, self._ahead, remote)

    def _read_piece(self, piece: Piece, first: int, out: Tensor) -> str | None:
        problems: list[str] = []
        while (problem := super()._read_piece(piece, first, out)) is not None:
            problems.append(problem)
            if piece.file in self._files:
                self._retired.append(self._files.pop(piece.file))
            where = self._sources[piece.file]
            if where:
                problems[-1] += f" (in the memory of {where.pop(0).host})"
            if not where:
                return "; ".join(problems)
        return None
