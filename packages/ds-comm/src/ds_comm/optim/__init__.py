"""Optimizers that reduce gradients themselves, and send few bytes."""

from __future__ import annotations

from ds_comm.optim.base import SelfReducingOptimizer
from ds_comm.optim.local_sgd import LocalSGD, nesterov
from ds_comm.optim.merge import merge_states
from ds_comm.optim.onebit_adam import OneBitAdam
from ds_comm.optim.onebit_lamb import OneBitLamb
from ds_comm.optim.options import CompressionOptions
from ds_comm.optim.sharded_onebit_adam import ShardedOneBitAdam
from ds_comm.optim.sharded_onebit_lamb import ShardedOneBitLamb
from ds_comm.optim.zero_one_adam import ZeroOneAdam

__all__ = [
    "CompressionOptions",
    "LocalSGD",
    "OneBitAdam",
    "OneBitLamb",
    "SelfReducingOptimizer",
    "ShardedOneBitAdam",
    "ShardedOneBitLamb",
    "ZeroOneAdam",
    "merge_states",
    "nesterov",
]
