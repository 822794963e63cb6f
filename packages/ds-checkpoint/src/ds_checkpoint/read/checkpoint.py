"""Reads a checkpoint by logical name and range, on any number of ranks, and verifies each byte before it is used."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_checkpoint.disk.infile import ReadAhead
from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format import coordinates as mesh
from ds_checkpoint.format import folder
from ds_checkpoint.format.datafile import DataFile
from ds_checkpoint.format.manifest import Entry, Manifest, Piece
from ds_checkpoint.interfaces import EVERYWHERE, Coordinates

MAX_PROBLEMS = 10


class Checkpoint:
    """An open checkpoint, from which owners of state read (`RecordSource`).

    `read` does not raise if data is damaged, because in the middle of a collective load the other ranks would wait
    forever. It records damage in `problems`, which the caller checks after the load.
    """

    def __init__(self, path: str | os.PathLike[str], stored: Manifest | None = None) -> None:
        """Opens the folder of one checkpoint (see `find`) and verifies its manifest. Data files are opened when
        needed.

        Args:
            stored: its manifest, if that was read already.

        Raises:
            CheckpointError: the manifest is damaged.
        """
        self.path = Path(path)
        self.manifest: Manifest = folder.read_manifest(self.path) if stored is None else stored
        self.problems: list[str] = []
        self._files: dict[str, DataFile] = {}
        self._ahead = ReadAhead()
        self._read: _Ranges = {}

    def narrow(self, coordinates: Coordinates, values: Mapping[str, Any]) -> None:
        """From here on have the tensors at these coordinates only, which then count as said; and other values."""
        tensors: dict[str, dict[str, tuple[Entry, ...]]] = {}
        for fqn, state, entry in self.manifest.entries():
            if all(entry.coordinates.get(axis, here) == here for axis, here in coordinates.items()):
                rest = {axis: at for axis, at in entry.coordinates.items() if axis not in coordinates}
                states = tensors.setdefault(fqn, {})
                states[state] = (*states.get(state, ()), replace(entry, coordinates=rest))
        self.manifest = replace(self.manifest, tensors=tensors, values=values)

    def check_files(self, first: int = 0, stride: int = 1) -> None:
        """Checks size and header of every `stride`-th data file, beginning with number `first`.

        Raises:
            CheckpointError: a file is missing, truncated or damaged.
        """
        for name in sorted(self.manifest.files)[first::stride]:
            self._file(name)

    def _file(self, name: str) -> DataFile:
        if name not in self._files:
            self._files[name] = DataFile(self.path / name, self.manifest.files[name], self._ahead)
        return self._files[name]

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def states(
        self, fqn: str, coordinates: Coordinates = EVERYWHERE
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Returns state name -> (global shape, dtype) for a parameter or buffer; empty if the name is unknown.

        Raises:
            CheckpointError: its values differ along other axes, or along axes of other sizes.
        """
        at = {state: self._at(fqn, state, coordinates) for state in self.manifest.tensors.get(fqn, {})}
        return {state: (entry.shape, entry.dtype) for state, entry in at.items() if entry is not None}

    def _at(self, fqn: str, state: str, coordinates: Coordinates) -> Entry | None:
        """The tensor at these coordinates; None if only others have one (a stage of a pipeline).

        Raises:
            CheckpointError: as `states`.
        """
        entries = self.manifest.tensors[fqn][state]
        mesh.check_sizes(f"{state} of {fqn!r}", (entry.coordinates for entry in entries), coordinates)
        wanted = mesh.hashable(coordinates)
        return next((e for e in entries if mesh.hashable(e.coordinates) == wanted), None)

    def _entry(self, fqn: str, state: str, coordinates: Coordinates) -> Entry:
        entry = self._at(fqn, state, coordinates)
        if entry is None:
            raise KeyError(f"there is no {state} of {fqn!r} at {mesh.text(coordinates)}")
        return entry

    def expect(self, ranges: Sequence[tuple[str, str, Coordinates, int, int]]) -> None:
        """Announces the following reads, in order: (name, state, coordinates, first element, number of elements)."""
        self._expect(
            part
            for fqn, state, coordinates, first, numel in ranges
            for part in _parts(self._entry(fqn, state, coordinates), first, first + numel)
        )

    def _expect(self, parts: Iterable[tuple[Piece, int, int]]) -> None:
        spans = []
        for piece, low, high in parts:
            with suppress(CheckpointError):  # `read` will report it
                first = low - piece.flat_offset
                spans.append(self._file(piece.file).span(piece.key, first, high - low))
        self._ahead.expect(span for span in spans if span is not None)

    def read(
        self, fqn: str, state: str, flat_offset: int, out: Tensor, coordinates: Coordinates = EVERYWHERE
    ) -> None:
        """Fills the 1-D `out` with elements [flat_offset, flat_offset + out.numel()), cast to its dtype."""
        self._fill(self._entry(fqn, state, coordinates), _name(fqn, state, coordinates), flat_offset, out)
        ranges = self._read.setdefault((fqn, state, mesh.hashable(coordinates)), [])
        ranges.append((flat_offset, flat_offset + out.numel()))

    def blob(self, name: str) -> Tensor:
        """Returns a tensor that belongs to no parameter, on the CPU. Damage is recorded in `problems`, as in `read`."""
        entry = self.manifest.blobs[name]
        out = torch.empty(entry.numel, dtype=entry.dtype)
        self._fill(entry, name, 0, out)
        return out.view(entry.shape)

    def tensor(self, fqn: str, state: str = "param", coordinates: Coordinates = EVERYWHERE) -> Tensor:
        """Returns a whole logical tensor on the CPU, in its own shape and dtype.

        Args:
            coordinates: where its values differ along axes of the mesh of ranks, which of them: axis -> (index, size).

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: it is damaged, or its values differ along other axes.
        """
        entry = self._entry(fqn, state, coordinates)
        before = len(self.problems)
        out = torch.empty(entry.numel, dtype=entry.dtype)
        self._fill(entry, _name(fqn, state, coordinates), 0, out)
        if len(self.problems) > before:
            raise CheckpointError("; ".join(self.problems[before:]))
        return out.view(entry.shape)

    def was_read(
        self, fqn: str, state: str, begin: int, end: int, coordinates: Coordinates = EVERYWHERE
    ) -> bool:
        """Whether every element of that range was requested."""
        at = begin
        for low, high in sorted(self._read.get((fqn, state, mesh.hashable(coordinates)), [])):
            if low <= at:
                at = max(at, high)
        return at >= end

    def verify(self) -> Iterator[str]:
        """Reads everything, and yields one sentence for each damaged tensor or file."""
        for name in sorted(self.manifest.files):
            try:
                self._file(name)
            except CheckpointError as error:
                yield str(error)
        entries = list(self.manifest.entries())
        self._expect((piece, piece.flat_offset, piece.end) for *_, entry in entries for piece in entry.pieces)
        for fqn, state, entry in entries:
            yield from self._check(entry, _name(fqn, state, entry.coordinates))
        for name, entry in self.manifest.blobs.items():
            yield from self._check(entry, name)

    def _check(self, entry: Entry, name: str) -> Iterator[str]:
        for piece in entry.pieces:
            problem = self._read_piece(piece, 0, torch.empty(piece.numel, dtype=entry.dtype))
            if problem:
                yield f"{problem}, in {name}"

    def _fill(self, entry: Entry, name: str, first: int, out: Tensor) -> None:
        end = first + out.numel()
        assert end <= entry.numel, f"{name} has {entry.numel} elements, {first} to {end} were requested"
        for piece, low, high in _parts(entry, first, end):
            problem = self._read_piece(piece, low - piece.flat_offset, out[low - first : high - first])
            if problem and len(self.problems) < MAX_PROBLEMS:
                self.problems.append(f"{problem}, in {name}")

    def _read_piece(self, piece: Piece, first: int, out: Tensor) -> str | None:
        """Fills `out` from element `first` of a piece on. Returns a description of the damage, or None."""
        try:
            return self._file(piece.file).read(piece.key, first, out, piece.crc32c)
        except CheckpointError as error:
            return str(error)
        except OSError as error:
            return f"{self.path / piece.file} cannot be read ({error.strerror})"


_Ranges = dict[tuple[str, str, tuple[tuple[str, int, int], ...]], list[tuple[int, int]]]
"""Name, state and coordinates -> ranges that were requested."""


def _name(fqn: str, state: str, coordinates: Coordinates) -> str:
    """Formats a state of a parameter for messages."""
    where = mesh.text(coordinates)
    return f"{state} of {fqn!r}" + (f" ({where})" if where else "")


def _parts(entry: Entry, first: int, end: int) -> Iterator[tuple[Piece, int, int]]:
    """Yields the pieces with elements [first, end) of a tensor, and the range of elements in each."""
    index = max(0, bisect.bisect_right(entry.pieces, first, key=lambda piece: piece.flat_offset) - 1)
    for piece in entry.pieces[index:]:
        low, high = max(first, piece.flat_offset), min(end, piece.end)
        if piece.flat_offset >= end:
            break
        if high > low:
            yield piece, low, high
