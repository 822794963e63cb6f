"""SGD with momentum."""

from __future__ import annotations

from ds_core.optim import FusedSGD
from ds_offload.optim.on_host import ElementWise


class CPUSGD(ElementWise, FusedSGD):
    """`ds_core.optim.FusedSGD` on the host, for parameters in fp32, bf16 or fp16; states on huge pages."""
