"""Collectives that send fewer bytes, over any process group, with the bytes counted."""

from __future__ import annotations

from ds_comm.exchange.channel import Channel, Traffic, Work
from ds_comm.exchange.compressed import CompressedAllReduce

__all__ = ["Channel", "CompressedAllReduce", "Traffic", "Work"]
