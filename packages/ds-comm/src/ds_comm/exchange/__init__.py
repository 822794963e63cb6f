"""Collectives over any process group that send fewer bytes or add in a fixed order, with the bytes counted."""

from __future__ import annotations

from ds_comm.exchange.channel import Channel, Traffic, Work
from ds_comm.exchange.compressed import CompressedAllReduce
from ds_comm.exchange.ddp_hook import CompressedHook
from ds_comm.exchange.hierarchy import HierarchicalCollectives, Hierarchy
from ds_comm.exchange.loco import LoCoReduceScatter
from ds_comm.exchange.ordered import OrderedAllReduce, OrderedReduceScatter
from ds_comm.exchange.quantized import QuantizedAllGather, QuantizedReduceScatter
from ds_comm.exchange.rows import HierarchicalAllToAll, PlainAllToAll, QuantizedAllToAll

__all__ = [
    "Channel",
    "CompressedAllReduce",
    "CompressedHook",
    "HierarchicalAllToAll",
    "HierarchicalCollectives",
    "Hierarchy",
    "LoCoReduceScatter",
    "OrderedAllReduce",
    "OrderedReduceScatter",
    "PlainAllToAll",
    "QuantizedAllGather",
    "QuantizedAllToAll",
    "QuantizedReduceScatter",
    "Traffic",
    "Work",
]
