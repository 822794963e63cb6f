"""Lion."""

from __future__ import annotations

from ds_core.optim import FusedLion
from ds_offload.optim.on_host import ElementWise


class CPULion(ElementWise, FusedLion):
    """`ds_core.optim.FusedLion` on the host, for parameters in fp32, bf16 or fp16; states on huge pages."""
