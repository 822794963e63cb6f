"""Optimizers that reduce gradients themselves, and send few bytes."""

from __future__ import annotations

from ds_comm.optim.base import SelfReducingOptimizer, merge_states
from ds_comm.optim.onebit_adam import OneBitAdam
from ds_comm.optim.options import CompressionOptions

__all__ = ["CompressionOptions", "OneBitAdam", "SelfReducingOptimizer", "merge_states"]
