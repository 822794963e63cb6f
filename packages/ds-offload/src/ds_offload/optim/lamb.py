"""LAMB."""

from __future__ import annotations

from ds_core.optim import FusedLamb
from ds_offload.optim.on_host import OnHost


class CPULamb(OnHost, FusedLamb):
    """`ds_core.optim.FusedLamb` on the host, for fp32 parameters; states on huge pages."""
