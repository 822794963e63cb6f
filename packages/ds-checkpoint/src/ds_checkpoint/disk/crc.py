"""The checksum of checkpoints: CRC-32C (Castagnoli), which processors compute at memory speed.

It detects every error within 32 consecutive bits, every odd number of flipped bits, and all but one in 4 billion of
other errors.
"""

from __future__ import annotations

from torch import Tensor

from ds_core import kernels


def crc32c(data: Tensor | bytes | bytearray | memoryview) -> str:
    """Returns the checksum as eight lower-case hexadecimal digits."""
    return f"{kernels.crc32c(data):08x}"
