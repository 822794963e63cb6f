"""Pieces of Adam that several optimizers use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_comm.compress.blocks import Blocks
from ds_comm.optim.base import Entry
from ds_comm.optim.options import CompressionOptions
from ds_core import kernels
from ds_core.optim.base import NO_CORRECTION_STEP

_CHUNK_NUMEL = 1 << 15
"""Elements whose intermediate results fit into the cache of a core: some 128 KiB each."""


def dense_adam(entries: Sequence[Entry], sums: Sequence[Tensor], factor: float) -> None:
    """One step of AdamW with gradients `sums * factor`: one kernel call for all parameters of a group with the same
    number of updates.
    """
    batches: dict[tuple[int, int], list[int]] = {}
    for i, entry in enumerate(entries):
        batches.setdefault((id(entry.group), entry.step), []).append(i)
    for rows in batches.values():
        members = [entries[i] for i in rows]
        values = [entry.values.contiguous() for entry in members]
        step_group(
            members[0].group,
            members[0].step,
            values,
            [entry.state["exp_avg"] for entry in members],
            [entry.state["exp_avg_sq"] for entry in members],
            [sums[i] for i in rows],
            factor,
        )
        for entry, value in zip(members, values, strict=True):
            if value.data_ptr() != entry.values.data_ptr():
                entry.values.copy_(value)  # the parameter has another memory format


def step_group(
    group: Mapping[str, Any],
    updates: int,
    values: Sequence[Tensor],
    momenta: Sequence[Tensor],
    variances: Sequence[Tensor],
    grads: Sequence[Tensor],
    factor: float,
) -> None:
    """One kernel call of AdamW with the options of `group`, for tensors with so many updates before; gradients are
    `grads * factor`.
    """
    beta1, beta2 = group["betas"]
    kernels.adam_step(
        values,
        momenta,
        variances,
        grads,
        step=updates + 1 if group["bias_correction"] else NO_CORRECTION_STEP,
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        grad_scale=factor,
    )


def bias_corrections(group: Mapping[str, Any], step: int, variance_updates: int) -> tuple[float, float]:
    """Returns what momentum and variance are divided by, after so many updates of each."""
    if not group["bias_correction"]:
        return 1.0, 1.0
    beta1, beta2 = group["betas"]
    return 1.0 - beta1**step, 1.0 - beta2**variance_updates


def quotient(momentum: Tensor, variance: Tensor, eps: float, bias2: float) -> Tensor:
    """Returns momentum / (sqrt(variance / bias2) + eps), and 0 where the variance is 0: such an element never had a
    gradient.
    """
    denominator = torch.sqrt(variance).mul_(1.0 / math.sqrt(bias2)).add_(eps)
    return torch.where(variance > 0.0, momentum / denominator, 0.0)


def step_frozen(
    values: Tensor, momentum: Tensor, variance: Tensor, *, eps: float, bias2: float, rate: float
) -> None:
    """Subtracts `rate * quotient(momentum, variance, eps, bias2)` from `values`, in chunks whose intermediate results
    stay in the cache.
    """
    if not values.is_contiguous():
        values.add_(quotient(momentum, variance, eps, bias2), alpha=-rate)
        return
    chunks = (x.view(-1).split(_CHUNK_NUMEL) for x in (values, momentum, variance))
    for value, own, frozen in zip(*chunks, strict=True):
        value.add_(quotient(own, frozen, eps, bias2), alpha=-rate)


def floor_variance(variance: Tensor, options: CompressionOptions) -> None:
    """Raises small elements to a fraction of the mean of their block: see `CompressionOptions.variance_floor`."""
    if options.variance_floor == 0.0 or variance.numel() == 0:
        return
    flat = variance.view(-1)
    table = Blocks.uniform(flat.numel(), options.compressor.block_numel).table.to(flat.device)
    whole = int(table[0, 1])
    padded = torch.zeros(len(table) * whole, dtype=torch.float32, device=flat.device)
    padded[: flat.numel()] = flat
    means = padded.view(-1, whole).sum(1) / table[:, 1]
    # A block without any gradient so far takes the mean of the tensor: its elements may get gradients later.
    floors = torch.where(means > 0.0, means, flat.mean()) * options.variance_floor
    torch.maximum(flat, floors.repeat_interleave(table[:, 1]), out=flat)
