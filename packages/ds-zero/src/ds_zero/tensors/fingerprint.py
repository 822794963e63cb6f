"""Detects whether a tensor was written, also through `.data`, which does not change the version counter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BLOCK_NUMEL = 1 << 18
_WORDS: Mapping[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTOR = 0x9E3779B1
"""Odd, so that multiplying by it loses no bit modulo 2**64."""


def fingerprint(tensor: Tensor) -> int:
    """Returns a 64-bit hash of all elements and their positions. Reads the tensor twice, a block at a time."""
    words = tensor.detach().reshape(-1).view(_WORDS[tensor.element_size()])
    if not words.numel():
        return 0
    # int64 arithmetic wraps, so every product and sum below is modulo 2**64.
    places = torch.arange(1, BLOCK_NUMEL + 1, device=words.device).mul_(2 * _FACTOR).add_(1)
    sums = [
        (block.to(torch.int64) * places[: block.numel()]).sum() for block in torch.split(words, BLOCK_NUMEL)
    ]
    sums_tensor = torch.stack(sums)
    mixed = (sums_tensor ^ (sums_tensor >> 29)) * torch.arange(1, len(sums) + 1, device=words.device).mul_(
        2
    ).add_(_FACTOR)
    return int(mixed.sum().item())
