"""Wraps the optimizer of a job into ds_comm's local SGD, from the section `local_sgd`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from ds_comm.compress import IntCompressor, SignCompressor, TopKCompressor
from ds_comm.compress.interfaces import Compressor
from ds_comm.optim import CompressionOptions, LocalSGD, nesterov
from ds_engine.config.sections.communication.local_sgd import LocalSgdConfig

_BLOCK_NUMEL = 4096
"""Elements among which the largest are sent."""


def with_outer_step(
    section: LocalSgdConfig | None, inner: Optimizer, group: dist.ProcessGroup | None = None
) -> Optimizer:
    """Returns `inner`, wrapped if there is a section.

    Args:
        group: the ranks with the same parameters; None: all.
    """
    if section is None:
        return inner
    return LocalSGD(
        inner,
        nesterov(section.outer_lr, section.outer_momentum),
        section.sync_every,
        start_step=section.start_step,
        group=group,
        compression=_compression(section),
    )


def _compression(section: LocalSgdConfig) -> CompressionOptions | None:
    if section.compression == "none":
        return None
    kept = max(1, round(section.density * _BLOCK_NUMEL))
    compressors: dict[str, Compressor] = {
        "int8": IntCompressor(bits=8),
        "int4": IntCompressor(bits=4),
        "sign": SignCompressor(),
        "topk": TopKCompressor(block_numel=_BLOCK_NUMEL, kept=kept),
    }
    residual = torch.float32 if section.residual_dtype == "fp32" else torch.bfloat16
    return CompressionOptions(compressor=compressors[section.compression], residual_dtype=residual)
