"""Timelines as PNG, written without an imaging library: filled rectangles and digits."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence

from ds_pipe.draw.timeline import Colour, boxes
from ds_pipe.simulate.results import Span

_ROW, _GAP = 22, 6
# Digits of 3 x 5 pixels: five rows of three bits each, from the top.
_DIGITS: Mapping[str, tuple[int, int, int, int, int]] = {
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 7, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 1, 2, 2),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
}


def png(spans: Sequence[Span], *, width: int = 1200) -> bytes:
    """Returns a timeline as the bytes of a PNG picture; the ranks are rows from top to bottom.

    Args:
        spans: what ran.
        width: width in pixels.
    """
    ranks = 1 + max((span.rank for span in spans), default=0)
    canvas = _Canvas(width, ranks * (_ROW + _GAP) + _GAP)
    for rank in range(ranks):
        canvas.fill(0, _GAP + rank * (_ROW + _GAP), width, _ROW, (242, 242, 242))
    for box in boxes(spans, "s"):
        x, right = round(box.left * width), round((box.left + box.width) * width)
        y = _GAP + box.rank * (_ROW + _GAP)
        if not box.computes:
            canvas.fill(x, y + _ROW, right - x, 3, box.colour)
            continue
        canvas.fill(x, y, max(1, right - x - 1), _ROW, box.colour)
        if right - x > 8 * len(box.label):
            canvas.digits((x + right - 8 * len(box.label)) // 2, y + 6, box.label)
    return canvas.encoded()


class _Canvas:
    def __init__(self, width: int, height: int) -> None:
        self._width, self._height = width, height
        self._rows = [bytearray(b"\xff" * (3 * width)) for _ in range(height)]

    def fill(self, x: int, y: int, width: int, height: int, colour: Colour) -> None:
        x, right = max(0, x), min(self._width, x + width)
        for row in self._rows[max(0, y) : min(self._height, y + height)]:
            row[3 * x : 3 * right] = bytes(colour) * max(0, right - x)

    def digits(self, x: int, y: int, text: str) -> None:
        for i, digit in enumerate(text):
            for dy, bits in enumerate(_DIGITS[digit]):
                for dx in range(3):
                    if bits & (4 >> dx):
                        self.fill(x + 8 * i + 2 * dx, y + 2 * dy, 2, 2, (255, 255, 255))

    def encoded(self) -> bytes:
        pixels = b"".join(b"\x00" + bytes(row) for row in self._rows)
        header = struct.pack(">IIBBBBB", self._width, self._height, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
