"""The text: the sources of Python's standard library, as bytes. Nothing is downloaded.

Files are split into train and validation by a hash of their path, so that no file is in both and the split is
the same on every machine. Batches are a pure function of the seed and of their place in the training, which is
what makes a continued run see exactly the bytes that the uninterrupted run would have seen.
"""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Not every Python comes with its tests, and tables of character sets are no text.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"})
SKIPPED_FOLDERS |= frozenset({"site-packages", "dist-packages"})
VALIDATION_PART = 16
"""One file in this many is held out."""
SMOOTHING = 0.1
"""Count added to every pair of the bigram model: of 1, 0.1 and 0.01 the one with the lowest loss."""


@dataclass(frozen=True)
class Corpus:
    """The bytes of both parts, uint8, each file followed by a zero byte."""

    train: Tensor
    validation: Tensor
    num_files: int


def load(root: Path | None = None) -> Corpus:
    """Reads every source file below `root` (default: the standard library of this interpreter).

    Raises:
        ValueError: there are no sources, which is so for a Python from a zip file.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED_FOLDERS & set(relative.parts):
            held_out = zlib.crc32(relative.as_posix().encode()) % VALIDATION_PART == 0
            parts[held_out].append(path.read_bytes() + b"\0")
    if not parts[0] or not parts[1]:
        raise ValueError(
            f"no Python sources below {root}: use a Python whose standard library is installed as files"
        )
    train, validation = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return Corpus(train, validation, len(parts[0]) + len(parts[1]))


def windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(inputs, targets), int64 (len(starts), length): the bytes from each start, and the one after each."""
    rows = text[starts[:, None] + torch.arange(length + 1)].long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def train_batch(text: Tensor, *, seed: int, index: int, size: int, length: int) -> tuple[Tensor, Tensor]:
    """Micro-batch number `index` of the whole training, counted over steps, accumulation and ranks."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return windows(text, torch.randint(len(text) - length, (size,), generator=generator), length)


def validation_windows(text: Tensor, *, count: int, length: int) -> tuple[Tensor, Tensor]:
    """`count` windows spread evenly over the validation part: always the same ones."""
    return windows(text, torch.linspace(0, len(text) - length - 1, count, dtype=torch.float64).long(), length)


class Bigram:
    """The baseline: the next byte given one byte, counted over the train part, with additive smoothing."""

    def __init__(self, text: Tensor) -> None:
        pairs = text[:-1].int() * 256 + text[1:].int()
        counts = torch.bincount(pairs, minlength=256 * 256).view(256, 256).double() + SMOOTHING
        self.log_probabilities = (counts / counts.sum(1, keepdim=True)).log()

    def loss(self, inputs: Tensor, targets: Tensor) -> float:
        """Mean negative log-likelihood of the targets in nats per byte."""
        return -self.log_probabilities[inputs.flatten(), targets.flatten()].mean().item()
