"""The layout that all payloads with one scale per block share: fp32 scales, then codes."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_comm.compress.blocks import Blocks

_ALIGNMENT = 16


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def scaled_bytes(num_blocks: int, numel: int, bits: int) -> int:
    """Returns the bytes of a payload: 4 for each block, and `bits` bits for each element of the buffer."""
    return _padded(4 * num_blocks) + _padded(-(-numel * bits // 8))


def scales_and_codes(payload: Tensor, blocks: Blocks, bits: int) -> tuple[Tensor, Tensor]:
    """Returns the two parts of a payload, as views.

    Raises ValueError if the payload does not belong to these blocks.
    """
    expected = scaled_bytes(len(blocks), blocks.numel, bits)
    if payload.dtype != torch.uint8 or payload.numel() < expected:
        raise ValueError(
            f"payload must have at least {expected} uint8 elements for {len(blocks)} blocks of {blocks.numel} "
            f"elements, but has {payload.numel()} of {payload.dtype}; make it with payload_like"
        )
    first = _padded(4 * len(blocks))
    return payload[: 4 * len(blocks)].view(torch.float32), payload[first:expected]
