"""Compressors: from floating-point tensors to fewer bytes and back, with error feedback."""

from __future__ import annotations

from ds_comm.compress.blocks import Blocks
from ds_comm.compress.feedback import ErrorFeedback, ResidualError, merge_feedback_states
from ds_comm.compress.fp8 import Fp8Compressor
from ds_comm.compress.integer import IntCompressor
from ds_comm.compress.interfaces import Compressor
from ds_comm.compress.sign import SignCompressor
from ds_comm.compress.topk import TopKCompressor

__all__ = [
    "Blocks",
    "Compressor",
    "ErrorFeedback",
    "Fp8Compressor",
    "IntCompressor",
    "ResidualError",
    "SignCompressor",
    "TopKCompressor",
    "merge_feedback_states",
]
