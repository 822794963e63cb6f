"""The zip archive that `torch.save` writes: one pickle, and one record of bytes for each storage."""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ds_checkpoint.errors import CheckpointError

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
MAX_PICKLE_BYTES = 1 << 30


class Archive:
    """The records of one file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        """Opens the archive.

        Raises:
            CheckpointError: the file is not such an archive, or it is a TorchScript archive, which contains code.
            OSError: the system cannot open it.
        """
        self.path = path
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise CheckpointError(
                    f"{path} cannot be read: it is not an archive of torch.save (a zip file, since torch 1.6); "
                    "it is damaged, incomplete, or another kind of file"
                )
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise CheckpointError(f"{path} is damaged: its table of contents cannot be read") from error
        names = [entry.filename for entry in entries]
        if len(set(names)) < len(names):
            raise CheckpointError(f"{path} is damaged: two of its records have the same name")
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise CheckpointError(f"{path} was not written by torch.save: it has no record data.pkl")
        self._folder = pickles[0].removesuffix("data.pkl")
        self._entries = {entry.filename.removeprefix(self._folder): entry for entry in entries}
        code = [name for name in self._entries if name == "constants.pkl" or name.startswith("code/")]
        if code:
            raise CheckpointError(
                f"{path} is a TorchScript archive (it has {code[0]}), which torch would execute, so it is not "
                "read. DeepSpeed's checkpoints are written by torch.save"
            )
        if "byteorder" in self._entries and self._record("byteorder") != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine, which is not supported")

    def pickle(self) -> bytes:
        """Returns the bytes of the pickle."""
        return self._record("data.pkl")

    def _record(self, name: str) -> bytes:
        begin, size = self._span(name)
        if size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{self.path} is damaged: the record {name} claims {size} bytes")
        raw = self._map[begin : begin + size]
        if zlib.crc32(raw) != self._entries[name].CRC:
            raise CheckpointError(f"{self.path} is damaged: the checksum of its record {name} is wrong")
        return raw

    def storage(self, key: str, dtype: torch.dtype, numel: int) -> Tensor:
        """Returns the storage `key` as a 1-D tensor over the mapped file.

        Raises:
            CheckpointError: the file has no such record, or the record has another size.
        """
        name = f"data/{key}"
        if name not in self._entries:
            raise CheckpointError(f"{self.path} is damaged: it has no record {name}, which a tensor needs")
        begin, size = self._span(name)
        if numel < 0 or size != numel * dtype.itemsize:
            raise CheckpointError(
                f"{self.path} is damaged: its record {name} has {size} bytes, a tensor expects {numel} "
                f"elements of {dtype}"
            )
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        if begin % dtype.itemsize:  # torch aligns its records; other programs might not
            return torch.frombuffer(bytearray(self._map[begin : begin + size]), dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=numel, offset=begin)

    def _span(self, name: str) -> tuple[int, int]:
        """Returns the first byte and the size of a record."""
        entry = self._entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise CheckpointError(
                f"{self.path} was not written by torch.save: its record {name} is compressed"
            )
        at = entry.header_offset
        if at < 0 or at + _LOCAL_HEADER.size > len(self._map):
            raise CheckpointError(f"{self.path} is damaged: its record {name} lies outside the file")
        magic, *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(self._map, at)
        begin = at + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if magic != b"PK\x03\x04" or entry.file_size < 0 or begin + entry.file_size > len(self._map):
            raise CheckpointError(f"{self.path} is damaged: its record {name} lies outside the file")
        return begin, entry.file_size
