"""Messages between the launcher and its agents: a header in JSON, and a body of raw bytes for output.

A frame is two lengths of four bytes (header, body; big-endian), the header, the body. The agent writes `MAGIC` before
its first frame, because a login shell may print text of its own before it starts the agent.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

MAGIC = b"\0ds-agent 1\n"
"""Precedes the frames of an agent. The number is that of this format."""
MAX_BYTES = 64 << 20
"""Maximum length of a header or a body. A greater number means that the stream is not one of frames."""
_LENGTHS = struct.Struct(">II")
_KEPT_BYTES = 4096


class FrameError(ValueError):
    """The bytes are not frames."""


@dataclass(frozen=True)
class Frame:
    """One message."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    body: bytes = b""

    def encoded(self) -> bytes:
        """Returns the bytes to send. Strings with bytes that are not UTF-8 (surrogates, as in os.environ) survive."""
        header = json.dumps({"kind": self.kind, **self.fields}).encode("ascii")
        return _LENGTHS.pack(len(header), len(self.body)) + header + self.body


class FrameReader:
    """Assembles frames from bytes that arrive in pieces.

    magic: whether the stream begins with MAGIC. Bytes before it are skipped; their end is kept in `preamble`.
    """

    def __init__(self, *, magic: bool = False) -> None:
        self.preamble = b""
        self._searching = magic
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yields the frames that `data` completes.

        Raises:
            FrameError: the bytes are not frames.
        """
        self._data += data
        if self._searching and not self._skip_preamble():
            return
        while (frame := self._take()) is not None:
            yield frame

    def _skip_preamble(self) -> bool:
        start = self._data.find(MAGIC)
        skipped = start if start >= 0 else max(0, len(self._data) - len(MAGIC) + 1)
        self.preamble = (self.preamble + bytes(self._data[:skipped]))[-_KEPT_BYTES:]
        if start < 0:
            del self._data[:skipped]
            return False
        del self._data[: start + len(MAGIC)]
        self._searching = False
        return True

    def _take(self) -> Frame | None:
        if len(self._data) < _LENGTHS.size:
            return None
        header_bytes, body_bytes = _LENGTHS.unpack_from(self._data)
        if max(header_bytes, body_bytes) > MAX_BYTES:
            raise FrameError(
                f"a frame of {max(header_bytes, body_bytes)} bytes; at most {MAX_BYTES} are possible"
            )
        start = _LENGTHS.size + header_bytes
        if len(self._data) < start + body_bytes:
            return None
        try:
            fields = json.loads(self._data[_LENGTHS.size : start])
            kind = fields.pop("kind")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise FrameError(f"a frame without a valid header: {error}") from None
        body = bytes(self._data[start : start + body_bytes])
        del self._data[: start + body_bytes]
        return Frame(kind, fields, body)
