"""What ds_zero expects of an optimizer that computes checksums, run against every implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import ds_core.optim
from ds_core import kernels, reference
from ds_offload import CPUAdam
from ds_zero.interfaces import ChecksummedStep, TakesChecksums
from ds_zero.tensors.checksums import CHECKSUM_BLOCK_NUMEL, checksums

Compute = Callable[[Sequence[Tensor], Sequence[Tensor]], object]
COMPUTED_BY: dict[str, Compute] = {
    "ds_zero": checksums,
    "ds_core": kernels.checksums,
    "reference": reference.checksums,
    "optimizer": CPUAdam([torch.ones(3)]).checksums,
}
OPTIMIZERS = (
    ds_core.optim.FusedAdagrad,
    ds_core.optim.FusedAdam,
    ds_core.optim.FusedLamb,
    ds_core.optim.FusedLion,
    ds_core.optim.FusedSGD,
    CPUAdam,
)


def by_definition(tensor: Tensor) -> list[int]:
    """[Note: checksum of a block], word by word."""
    sums = []
    for block in tensor.reshape(-1).split(CHECKSUM_BLOCK_NUMEL):
        data = block.clone().view(torch.uint8).numpy().tobytes()
        data += bytes(-len(data) % 4)
        words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
        total = sum(w * ((2 * i + 1) * 0x9E3779B1 % 2**32) for i, w in enumerate(words)) % 2**64
        sums.append(total - 2**64 if total >= 2**63 else total)
    return sums


@pytest.mark.parametrize("compute", COMPUTED_BY.values(), ids=COMPUTED_BY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_compute_the_same_numbers(compute: Compute, dtype: torch.dtype) -> None:
    numels = (1, 2, 33, CHECKSUM_BLOCK_NUMEL, 70 * CHECKSUM_BLOCK_NUMEL + 5)
    tensors = [torch.randn(n).to(dtype) for n in numels]
    tensors += [torch.randn(40).to(dtype)[1:], torch.randn(6, 7).to(dtype)]
    out = [torch.full((-(-t.numel() // CHECKSUM_BLOCK_NUMEL),), -1) for t in tensors]
    compute(tensors, out)
    assert [o.tolist() for o in out] == [by_definition(t) for t in tensors]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_protocols(make: Callable[..., torch.optim.Optimizer]) -> None:
    assert isinstance(make([torch.ones(3)]), ChecksummedStep)
    assert isinstance(make([torch.ones(3)]), TakesChecksums)
    assert not isinstance(torch.optim.AdamW([torch.ones(3)]), TakesChecksums)
