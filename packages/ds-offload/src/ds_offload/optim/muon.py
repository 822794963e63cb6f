"""Muon."""

from __future__ import annotations

from ds_core.optim import Muon
from ds_offload.optim.on_host import OnHost


class CPUMuon(OnHost, Muon):
    """`ds_core.optim.Muon` on the host, for fp32 parameters; states on huge pages."""
