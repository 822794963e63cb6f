"""One rank's data file: the safetensors format, written and read in blocks whose checksums the manifest
keeps.

The safetensors library is not used, because it needs all tensors in host memory at once, and because checksums are
computed in the same pass. Every safetensors reader reads these files: 8 bytes of header length, a JSON header, then
the tensors without gaps. [Note: blocks] Each block of `block_bytes` bytes of a tensor, counted from its first byte,
has a checksum. So a rank that needs a range verifies only the blocks that it reads.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ds_checkpoint.disk.buffers import Bytes
from ds_checkpoint.disk.crc import crc32c
from ds_checkpoint.disk.infile import InFile, ReadAhead
from ds_checkpoint.disk.outfile import OutFile
from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format.records import in_memory
from ds_checkpoint.interfaces import StoredTensor
from ds_core import kernels

if TYPE_CHECKING:
    from ds_checkpoint.format.image import Image

NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Name of each dtype in safetensors."""
DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in NAMES.items()}

MIN_BLOCK_BYTES = 1 << 20
"""Small enough that a block stays in a core's second-level cache between the read, the checksum and the copy."""
MAX_BLOCKS = 4096
"""Approximate maximum number of blocks per file: larger files have larger blocks, so that the manifest does not grow
with the model.
"""
DATA_ALIGN_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Item:
    """One tensor to write."""

    key: str
    """Unique name in the file."""
    data: Tensor | StoredTensor
    """1-D and contiguous, on any device, or not in memory."""
    shape: tuple[int, ...] | None = None
    """Shape in the header. Default: that of `data`."""

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """The manifest's entry for a data file."""

    num_bytes: int
    header_bytes: int
    """Bytes of the length field and the header, which is the position of the first tensor."""
    header_crc32c: str
    block_bytes: int


@dataclass(frozen=True, kw_only=True)
class Written:
    """The result of writing a file."""

    info: FileInfo
    crc32c: Mapping[str, str]
    """Key -> concatenated checksums of its blocks, eight digits each."""


def block_bytes_for(total_bytes: int) -> int:
    """Returns the smallest power of two, at least `MIN_BLOCK_BYTES`, with which a file has at most about `MAX_BLOCKS`
    blocks.
    """
    block = MIN_BLOCK_BYTES
    while block * MAX_BLOCKS < total_bytes:
        block *= 2
    return block


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Positions of the tensors in a file to write."""

    header: bytes
    begins: Mapping[str, int]
    """Key -> first byte, in the order of the file."""
    num_bytes: int
    block_bytes: int


def layout(items: Sequence[Item], kind: str = "ds-checkpoint") -> Layout:
    """Computes the positions of the items. Raises ValueError for a dtype that safetensors does not have."""
    # Wide dtypes first: without gaps, each tensor then still starts at a multiple of its element size.
    ordered = sorted(items, key=lambda item: -item.data.element_size())
    header = _header(ordered, kind)
    begins, at = {}, len(header)
    for item in ordered:
        begins[item.key] = at
        at += item.num_bytes
    return Layout(header=header, begins=begins, num_bytes=at, block_bytes=block_bytes_for(at))


def write(
    path: Path, items: Sequence[Item], *, kind: str = "ds-checkpoint", image: Image | None = None
) -> Written:
    """Writes a new file and waits until it is on the disk.

    Args:
        kind: the "format" in the header's metadata; transformers reads only files with "pt".
        image: contains the whole file already; the items are views of it.

    Raises:
        OSError: the write failed, for example because the disk is full. The file is then incomplete.
        ValueError: a dtype that safetensors does not have.
    """
    plan = layout(items, kind) if image is None else image.layout
    sums: dict[str, str] = {}
    with OutFile(path, plan.num_bytes) as file:
        if image is not None:
            sums = {item.key: image.sums(item.key, in_memory(item.data)) for item in items}
            file.write(image.content)
        else:
            file.write(plan.header)
            by_key = {item.key: item.data for item in items}
            for key in plan.begins:
                digits = []
                for block in _blocks(in_memory(by_key[key]), plan.block_bytes):
                    digits.append(crc32c(block))
                    file.write(block)
                sums[key] = "".join(digits)
    info = FileInfo(
        num_bytes=plan.num_bytes,
        header_bytes=len(plan.header),
        header_crc32c=crc32c(plan.header),
        block_bytes=plan.block_bytes,
    )
    return Written(info=info, crc32c=sums)


def _header(items: Sequence[Item], kind: str) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": kind}}
    offset = 0
    for item in items:
        if item.data.dtype not in NAMES:
            raise ValueError(
                f"{item.key!r} has dtype {item.data.dtype}, which the safetensors format does not have"
            )
        assert item.key not in entries, item.key
        if isinstance(item.data, Tensor):
            assert item.data.ndim == 1 and item.data.is_contiguous(), item.key
        entries[item.key] = {
            "dtype": NAMES[item.data.dtype],
            "shape": list(item.shape) if item.shape is not None else [item.data.numel()],
            "data_offsets": [offset, offset + item.num_bytes],
        }
        offset += item.num_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    padded = -(-(8 + len(text)) // DATA_ALIGN_BYTES) * DATA_ALIGN_BYTES - 8
    return struct.pack("<Q", padded) + text.ljust(padded)


def _blocks(data: Tensor, block_bytes: int) -> Iterator[Tensor]:
    """Yields the bytes of a tensor in pieces on the CPU. Of a tensor on a device, at most one block is copied at a
    time.
    """
    raw = data.detach().view(torch.uint8)
    for begin in range(0, raw.numel(), block_bytes):
        yield raw[begin : begin + block_bytes].cpu()


@dataclass
class _Place:
    """The position of a tensor in a file."""

    dtype: torch.dtype
    numel: int
    begin: int
    """First byte in the file."""
    verified: set[int] = field(default_factory=set)
    """Indices of blocks whose checksums were verified."""

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


class DataFile:
    """Reads ranges of tensors, and verifies each accessed block once."""

    def __init__(
        self, path: Path, info: FileInfo, ahead: ReadAhead | None = None, file: InFile | None = None
    ) -> None:
        """Opens the file and checks its size and header. Raises CheckpointError if they differ from the manifest.

        Args:
            ahead: shared by files that are read one after another. Default: one for this file alone.
            file: the open file, where it is not to be opened at `path`.
        """
        self.path = path
        self.info = info
        try:
            self._file = InFile(path) if file is None else file
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be opened ({error.strerror}): the checkpoint is incomplete"
            ) from error
        try:
            self._places = self._read_header()
        except BaseException:
            self._file.close()
            raise
        self._ahead = ahead or ReadAhead()
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        """Closes the file and ends all read-ahead, also of other files. Safe to call twice."""
        self._ahead.close()
        self._file.close()

    def _read_header(self) -> dict[str, _Place]:
        size = self._file.num_bytes
        if size != self.info.num_bytes:
            raise CheckpointError(
                f"{self.path} has {size} bytes, the manifest says {self.info.num_bytes}: it was truncated or "
                "changed"
            )
        room = np.empty(self.info.header_bytes, dtype=np.uint8)
        raw = room[: self._file.read(0, room)].tobytes()
        if crc32c(raw) != self.info.header_crc32c:
            raise CheckpointError(
                f"{self.path}: the header is damaged (its checksum is {crc32c(raw)}, not "
                f"{self.info.header_crc32c})"
            )
        places: dict[str, _Place] = {}
        for key, entry in json.loads(raw[8:]).items():
            if key != "__metadata__":
                begin = self.info.header_bytes + int(entry["data_offsets"][0])
                places[key] = _Place(dtype=DTYPES[entry["dtype"]], numel=int(entry["shape"][0]), begin=begin)
        return places

    def span(self, key: str, first: int, numel: int) -> tuple[InFile, int, int] | None:
        """Returns the range of bytes that `read` accesses for these elements; None if they do not exist."""
        place = self._places.get(key)
        if place is None or first + numel > place.numel:
            return None
        begin, end = self._blocks_around(place, first, numel)
        return self._file, place.begin + begin, place.begin + end

    def _blocks_around(self, place: _Place, first: int, numel: int) -> tuple[int, int]:
        """Extends a range of bytes to whole blocks, since only blocks have checksums."""
        size, width = self.info.block_bytes, place.dtype.itemsize
        end = -(-(first + numel) * width // size) * size
        return first * width // size * size, min(end, place.num_bytes)

    def read(self, key: str, first: int, out: Tensor, sums: str) -> str | None:
        """Fills `out` with elements [first, first + out.numel()) of the tensor `key`, cast to its dtype.

        Args:
            out: 1-D, on any device.
            sums: the checksums of the tensor's blocks.

        Returns:
            None, or a description of the damage; the contents of `out` are then undefined.

        Raises:
            OSError: the system cannot read the file.
        """
        place = self._places.get(key)
        if place is None or first + out.numel() > place.numel:
            return f"{self.path} has no elements {first} to {first + out.numel()} of {key!r}"
        width, block_bytes = place.dtype.itemsize, self.info.block_bytes
        begin, end = first * width, (first + out.numel()) * width
        if begin == end:
            return None
        # Whole blocks, since only blocks have checksums.
        at, stop = (
            begin // block_bytes * block_bytes,
            min(-(-end // block_bytes) * block_bytes, place.num_bytes),
        )
        take = self._taker(out.detach(), place.dtype, begin, stop)
        problem: str | None = None
        crc = 0
        for view in self._ahead.views(self._file, place.begin + at, place.begin + stop):
            while view.nbytes:
                number = at // block_bytes
                block_end = min((number + 1) * block_bytes, stop)
                part, view = view[: block_end - at], view[block_end - at :]
                known = number in place.verified
                crc = 0 if known else kernels.crc32c(part.data, crc)
                take(at, part)  # while the cache has it
                at += part.nbytes
                if at == block_end and not known:
                    actual, wanted, crc = f"{crc:08x}", sums[8 * number : 8 * number + 8], 0
                    if actual == wanted:
                        place.verified.add(number)
                    elif problem is None:
                        low, high = place.begin + number * block_bytes, place.begin + block_end
                        problem = (
                            f"bytes {low} to {high} are damaged (their checksum is {actual}, not {wanted})"
                        )
        if at < stop:
            problem = problem or f"the file ends at byte {place.begin + at}"
        return problem and f"{self.path}: {problem}"

    def _taker(self, out: Tensor, dtype: torch.dtype, begin: int, stop: int) -> Callable[[int, Bytes], None]:
        """Returns a function that copies bytes of a tensor, from byte `at` on, into `out`, which begins at byte
        `begin`.
        """
        end = begin + out.numel() * dtype.itemsize
        if out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous():
            target = out.view(torch.uint8).numpy()

            def take(at: int, part: Bytes) -> None:
                low, high = max(at, begin), min(at + part.nbytes, end)
                if low < high:
                    np.copyto(target[low - begin : high - begin], part[low - at : high - at])

            return take
        block_bytes = self.info.block_bytes
        if not self._scratch.numel():
            self._scratch = torch.empty(block_bytes, dtype=torch.uint8)
        scratch = self._scratch

        def cast(at: int, part: Bytes) -> None:
            base = at // block_bytes * block_bytes
            scratch.numpy()[at - base : at - base + part.nbytes] = part
            if at + part.nbytes == min(base + block_bytes, stop):  # an element may span two parts
                low, high = max(base, begin), min(at + part.nbytes, end)
                first, last = (low - begin) // dtype.itemsize, (high - begin) // dtype.itemsize
                out[first:last].copy_(scratch[low - base : high - base].view(dtype))

        return cast
